"""The operators' benchmark on the CPU: what it times, what it counts, and its report."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_hammer.platforms import operator_benchmark
from megatron_hammer.platforms.operator_benchmark import Bench
from megatron_hammer.scaling.measured.operator_profile import read_report


@pytest.fixture(autouse=True)
def small_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_benchmark, "CPU_GEMM_SHAPES", ((32, 16, 8), (64, 64, 64)))
    monkeypatch.setattr(operator_benchmark, "CPU_ATTENTION", ((32,), 4, 8))
    monkeypatch.setattr(operator_benchmark, "NUM_SMALL_CALLS", 10)
    monkeypatch.setattr(operator_benchmark, "MAX_CALLS", 6)


def test_calls_are_counted_and_timed() -> None:
    bench, calls = Bench("cpu", 0.02), []
    bench.add("sleep", (3,), "fp32", lambda: calls.append(time.sleep(0.004)), flops=8.0, num_bytes=2.0, is_alone=False)
    (timing,) = bench.timings
    assert len(calls) == 2 + operator_benchmark.MIN_CALLS
    assert 0.004 <= timing.fastest_s <= timing.median_s < 1.0
    assert (timing.operator, timing.shape, timing.flops, timing.num_bytes, timing.num_processes) == (
        "sleep", (3,), 8.0, 2.0, 1,
    )  # fmt: skip


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that only waits takes no CPU seconds; several threads are timed by the wall."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = Bench("cpu", 0.02)
    alone.add("sleep", (), "fp32", lambda: time.sleep(0.01))
    assert alone.timings[0].median_s < 0.005
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threaded = Bench("cpu", 0.02)
    threaded.add("sleep", (), "fp32", lambda: time.sleep(0.01))
    assert threaded.timings[0].median_s >= 0.01


def test_every_operator_of_a_step_is_timed() -> None:
    bench = Bench("cpu", 0.001)
    operator_benchmark.time_all(bench, ["fp32", "bf16"])
    found = {(timing.operator, timing.dtype) for timing in bench.timings}
    both = {"gemm", "attention", "attention_with_backward", "copy", "add", "rms_norm", "swiglu"}
    assert found == {(name, dtype) for name in both for dtype in ("fp32", "bf16")} | {
        ("cross_entropy_with_backward", "fp32"), ("adam", "fp32"), ("launch", "fp32"),
    }  # fmt: skip
    gemm = next(timing for timing in bench.timings if timing.shape == (32, 16, 8) and timing.dtype == "bf16")
    assert (gemm.flops, gemm.num_bytes) == (2 * 32 * 16 * 8, 2 * (32 * 16 + 16 * 8 + 32 * 8))
    attention = [timing for timing in bench.timings if timing.operator.startswith("attention")][:2]
    assert attention[1].flops == 3.5 * attention[0].flops == 3.5 * 2 * 2 * 4 * 32 * 32 * 8
    assert all(timing.fastest_s > 0 for timing in bench.timings)


def test_fp8_needs_a_gpu() -> None:
    bench = Bench("cpu", 0.001)
    operator_benchmark.time_fp8_gemms(bench)
    assert bench.timings == []


def test_report_is_what_profile_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "operators.json"
    options = ["--platform", "cpu", "--output", str(path), "--seconds-per-operator", "0.001"]
    monkeypatch.setattr(sys, "argv", ["operator_benchmark", *options])
    monkeypatch.setattr(operator_benchmark, "time_all", lambda bench, precisions: bench.time_small_calls())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    num_threads = torch.get_num_threads()
    try:
        operator_benchmark.main()
    finally:
        torch.set_num_threads(num_threads)
    report = read_report(path)
    (timing,) = report.timings
    assert (timing.operator, timing.shape) == ("launch", (16,))
    assert (report.platform, report.num_processes, report.num_multiprocessors) == ("cpu", 1, 1)
    assert report.num_cores >= 1
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [path]
