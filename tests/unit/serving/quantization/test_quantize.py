"""A quantized folder is compared with its source, and what is wrong in it is named. AutoRound does not run here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hammer.errors import ConfigError, ConversionError, OutputError
from megatron_hammer.serving.quantization.quantize import QuantizationOptions, quantize, verify
from megatron_hammer.serving.quantization.run_auto_round import RoundingOptions, quiet_libraries
from megatron_hammer.serving.quantization.source_model import open_quantizable
from tests.helpers.messages import assert_problems, raises_problem
from tests.helpers.packed_folders import pack_folder, write_small_source

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("method, bits", [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_a_folder_that_was_packed_well_passes(source, tmp_path, method: str, bits: int) -> None:
    packed = pack_folder(source, tmp_path / "q", method, bits)
    checks, others = verify(open_quantizable(source, group_size=32), packed)
    assert [row.is_passed for row in checks] == [True] * 3
    assert checks[0].result.startswith("14")
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(others)


def shift_zeros(tensors):
    tensors[f"{LAYER}.qzeros"] += 0x01010101


def swap_rows(tensors):
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].flip(0)


def double_scales(tensors):
    tensors[f"{LAYER}.scales"] *= float("nan")


@pytest.mark.parametrize("damage", [shift_zeros, swap_rows, double_scales])
def test_a_damaged_layer_is_named(source, tmp_path, damage) -> None:
    packed = pack_folder(source, tmp_path / "q", "gptq", 8)
    tensors = load_file(packed / "model.safetensors")
    damage(tensors)
    save_file(tensors, packed / "model.safetensors")
    with raises_problem(ConversionError, str(packed), LAYER, "near the source"):
        verify(open_quantizable(source, group_size=32), packed)


def test_a_layer_that_stayed_plain_and_a_changed_head_are_named(source, tmp_path) -> None:
    packed = pack_folder(source, tmp_path / "q", "awq")
    tensors = load_file(packed / "model.safetensors")
    plain = load_file(source / "model.safetensors")
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{LAYER}.{part}"]
    tensors[f"{LAYER}.weight"] = plain[f"{LAYER}.weight"].half()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        verify(open_quantizable(source, group_size=32), packed)
    assert_problems(
        error.value.problems,
        (str(packed), LAYER, "must be quantized"),
        (str(packed), "lm_head.weight", "fp16"),
    )


def test_options_that_cannot_work_are_named_at_once(source, tmp_path) -> None:
    options = QuantizationOptions(
        load_dir=source,
        save_dir=tmp_path / "out",
        calibration=(),
        num_samples=0,
        rounding=RoundingOptions(format="awq", bits=8, iterations=-1, group_size=16, seed=-1),
    )
    with pytest.raises(ConfigError) as error:
        quantize(options)
    assert_problems(
        error.value.problems,
        ("iterations", "got -1"),
        ("num-samples", "got 0"),
        ("seed", "from 0 to 4294967295", "got -1"),
        ("group-size", "128, 64, 32", "got 16"),
        ("bits", "got 8", "--bits 4"),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save_dir", [Path("."), Path("..")])
def test_the_source_is_not_replaced(source, save_dir: Path) -> None:
    options = QuantizationOptions(
        load_dir=source,
        save_dir=source / save_dir,
        calibration=(),
        rounding=RoundingOptions(group_size=32),
        overwrite=True,
    )
    with raises_problem(OutputError, f"{source / save_dir}", f"must not be or hold the input {source}"):
        quantize(options)


def test_more_tokens_than_positions_are_refused(source, tmp_path) -> None:
    options = QuantizationOptions(
        load_dir=source,
        save_dir=tmp_path / "out",
        calibration=(),
        seq_length=113,
        rounding=RoundingOptions(group_size=32),
    )
    with raises_problem(ConfigError, "seq-length", "seq_length=113 for 112", "--seq-length 112"):
        quantize(options)


def test_a_weight_beyond_fp16_is_refused_and_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    from megatron_hammer.serving.quantization import quantize as module
    from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl

    def write_large(folder, output_dir, samples, rounding):
        written = pack_folder(folder, output_dir / "written", "gptq")
        tensors = load_file(written / "model.safetensors")
        tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 1e5, dtype=torch.float32)
        save_file(tensors, written / "model.safetensors")
        return written

    monkeypatch.setattr(module, "quantize_folder", write_large)
    options = QuantizationOptions(
        load_dir=source,
        save_dir=tmp_path / "out",
        calibration=(str(write_jsonl(tmp_path / "text.jsonl", TOY_TEXTS * 9)),),
        num_samples=2,
        seq_length=16,
        rounding=RoundingOptions(group_size=32),
    )
    with raises_problem(ConversionError, str(source), "lm_head.weight", "1e+05", "to_gguf.py"):
        quantize(options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_progress_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm

    build_bar = tqdm.__init__
    with quiet_libraries():
        assert list(tqdm(range(2), "Loading")) == [0, 1]
    assert capsys.readouterr().err == ""
    assert tqdm.__init__ is build_bar
