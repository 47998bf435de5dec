"""Seconds of a step from tokens, FLOP/s and utilisations, in the convention that the row names."""

from pathlib import Path

import pytest

from tests.helpers.run_tables import read_one


def test_step_time_from_each_measure(tmp_path: Path) -> None:
    tokens = 64 * 2048
    by_tokens = read_one(tmp_path, iteration_time_s="", tokens_per_s_per_gpu="10000")
    assert by_tokens.step_time_s == pytest.approx(tokens / 10000 / 16)
    per_token = 6 * (24 * 12 * 2048**2 + 51200 * 2048)  # no biases or norms in the counted matrices
    attention = 12 * 24 * 2048 * 2048
    by_flops = {
        "FULL (non-causal) attention, no input-embedding FLOPs": per_token + attention,
        "CAUSAL (half) attention": per_token + attention / 2,
        "hardware FLOPs": per_token + attention + (24 * 12 * 2048**2 * 6 + attention) / 3,
    }
    for definition, flops in by_flops.items():
        recompute = "full" if "hardware" in definition else "none"
        cells = {"iteration_time_s": "", "tflops_per_gpu": "400", "recompute": recompute}
        run = read_one(tmp_path, **cells, mfu_definition=definition)
        assert run.step_time_s == pytest.approx(flops * tokens / 400e12 / 16, rel=1e-6), definition
        assert run.measured_as == "tflops_per_gpu"
        assert any(text.startswith("FLOP convention") for text in run.assumptions)
    definition = "FULL (non-causal) attention, peak 989 (bf16) / 1979 (fp8)"
    for precision, peak in (("bf16", 989e12), ("fp8", 1979e12)):
        run = read_one(tmp_path, iteration_time_s="", mfu="0.4", mfu_definition=definition, precision=precision)
        expected = (per_token + attention) * tokens / (0.4 * peak) / 16
        assert run.step_time_s == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "gpu", "peak"),
    [("MXFP8", "H100", 1979), ("FP8", "H100", 1979), ("BF16", "H100", 989), ("NVFP4", "B200", 9000)],
)
def test_a_utilisation_is_of_the_peak_of_its_format(tmp_path: Path, precision: str, gpu: str, peak: float) -> None:
    run = read_one(tmp_path, iteration_time_s="", mfu="0.2", precision=precision, gpu_type=gpu)
    (assumed,) = (text for text in run.assumptions if text.startswith("MFU of"))
    assert float(assumed.split()[2]) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("definition", "convention"),
    [
        ("HFU-like: FLOPs INCLUDE recompute (96BslH^2 formula)", "hardware"),
        ("% of peak, incl. recompute", "hardware"),
        ("tflops are hardware FLOPs", "hardware"),
        ("FULL (non-causal) attention, no input-embedding FLOPs", "B"),
        ("Model TFLOP/s per arXiv 2205.05198 App. A", "B"),
        ("reproduces with CAUSAL (half) attention, no input-embedding", "A"),
        ("3*(2N*T + 4*L*d*s^2 full non-causal attn) incl. embedding params", "D"),
        ("nanoGPT/PaLM", "D"),
        ("6N", "C"),
        ("", "B"),
    ],
)
def test_the_convention_that_a_definition_means(tmp_path: Path, definition: str, convention: str) -> None:
    cells = {"iteration_time_s": "", "tflops_per_gpu": "300", "mfu_definition": definition}
    (found,) = (text for text in read_one(tmp_path, **cells).assumptions if text.startswith("FLOP convention"))
    assert found.split(":")[0] == f"FLOP convention {convention}"


def test_attention_counted_as_multi_head(tmp_path: Path) -> None:
    cells = {"kv_heads": "4", "iteration_time_s": "", "tflops_per_gpu": "300"}
    grouped = read_one(tmp_path, **cells, mfu_definition="FULL (non-causal) attention")
    counted = read_one(tmp_path, **cells, mfu_definition="FULL (non-causal) attention; attention counted as MHA")
    extra = 6 * 24 * 2 * (16 - 4) * 128 * 2048  # keys and values of the heads that are not there
    assert (counted.step_time_s - grouped.step_time_s) * 300e12 * 16 == pytest.approx(extra * 64 * 2048)
