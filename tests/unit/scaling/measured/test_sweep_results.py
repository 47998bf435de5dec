"""Step times of finished runs, and their rows as the readers of published tables see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.model.accounting import count_flops_per_token
from megatron_hammer.scaling.measured.sweep import Sweep, list_settings
from megatron_hammer.scaling.measured.sweep_results import (
    COLUMNS,
    MeasuredSetting,
    StepTimes,
    build_row,
    format_rows,
    read_step_times,
)
from megatron_hammer.scaling.published.measured_runs import read_runs


def write_metrics(path: Path, times_s: list[float], **changes: Any) -> Path:
    lines = [{"step": step, "step_time_s": time_s, "peak_memory_bytes": step} for step, time_s in enumerate(times_s, 1)]
    path.write_text("".join(json.dumps(line | changes) + "\n" for line in lines))
    return path


def measure(layout: str, median_s: float = 0.5, **sizes: Any) -> MeasuredSetting:
    (setting,) = list_settings(Sweep(presets=("hammer-tiny",), layouts=(layout,), **sizes))
    times = StepTimes(
        num_steps=20, num_warmup_steps=5, median_s=median_s, fastest_s=0.9 * median_s, low_s=0.95 * median_s,
        high_s=1.2 * median_s, peak_memory_bytes=2**30,
    )  # fmt: skip
    return MeasuredSetting(setting=setting, repeats=(times,))


def test_warm_up_is_dropped(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [9.0, 8.0, *(1.0 + step / 10 for step in range(11))])
    times = read_step_times(path, num_steps=13, num_warmup_steps=2)
    assert (times.median_s, times.fastest_s) == (1.5, 1.0)
    assert (times.low_s, times.high_s) == pytest.approx((1.1, 1.9))
    assert times.peak_memory_bytes == 13


def test_one_step_is_its_own_spread(tmp_path: Path) -> None:
    times = read_step_times(write_metrics(tmp_path / "m.jsonl", [5.0, 2.0]), num_steps=2, num_warmup_steps=1)
    assert (times.low_s, times.median_s, times.high_s) == (2.0, 2.0, 2.0)


def test_runs_that_are_not_complete(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [1.0, 1.0])
    match = "metrics.jsonl: must hold steps 1 to 3, got 2 lines ending with step 2. Run the setting again."
    with pytest.raises(DataError, match=match):
        read_step_times(path, num_steps=3, num_warmup_steps=0)
    path.write_text("")
    with pytest.raises(DataError, match=r"got 0 lines ending with step none\. Run the setting again\."):
        read_step_times(path, num_steps=3, num_warmup_steps=0)
    path.write_text('{"step": 1, "st')
    with pytest.raises(DataError, match=r"metrics\.jsonl: must hold steps 1 to 1, got 0 lines"):
        read_step_times(path, num_steps=1, num_warmup_steps=0)


def test_statistics_over_repeats() -> None:
    first, second, third = (measure("single", median_s).repeats[0] for median_s in (0.5, 0.6, 0.9))
    measured = MeasuredSetting(setting=measure("single").setting, repeats=(first, second, third))
    assert measured.step_time_s("median") == 0.6
    assert measured.step_time_s("fastest") == 0.45


def test_row_of_a_setting() -> None:
    measured = measure("tp2-sp-pp2", global_batch_sizes=(16,))
    row = build_row(measured, gpu_type="cpu-core", source="mine", statistic="median")
    assert tuple(row) == COLUMNS
    assert (row["gpus"], row["tp"], row["pp"], row["vpp"], row["dp"], row["sequence_parallel"]) == (
        4, 2, 2, "", 1, "yes",
    )  # fmt: skip
    tokens_per_s_per_gpu = 16 * 256 / 0.5 / 4
    assert float(row["tokens_per_s_per_gpu"]) == pytest.approx(tokens_per_s_per_gpu)
    flops = count_flops_per_token(measured.setting.preset.model, 256, "A")
    assert float(row["tflops_per_gpu"]) == pytest.approx(tokens_per_s_per_gpu * flops / 1e12, rel=1e-5)
    assert row["mfu"] == ""
    assert row["notes"] == (
        "median of 1 x 15 steps; 80 % of the steps of a repeat within 0.475 to 0.6 s; fastest 0.45 s"
    )


def test_rows_are_read_as_the_plans_that_ran(tmp_path: Path) -> None:
    measured = [
        measure("single"), measure("tp2"), measure("tp2-sp"), measure("pp2-dp2", micro_batch_sizes=(1,)),
        measure("dp4-ddp", recompute=("full",)), measure("pp2-vp2", seq_lengths=(128,)),
    ]  # fmt: skip
    rows = [build_row(entry, gpu_type="cpu-core", source="mine", statistic="median") for entry in measured]
    path = tmp_path / "runs.csv"
    path.write_text(format_rows(rows))
    runs, unpredictable = read_runs(path)
    assert unpredictable == []
    for entry, run in zip(measured, runs, strict=True):
        setting, plan = entry.setting, run.plan
        assert plan.model == setting.preset.model
        assert plan.layout == setting.layout
        assert (plan.seq_length, plan.micro_batch_size, plan.global_batch_size) == (
            setting.seq_length, setting.micro_batch_size, setting.global_batch_size,
        )  # fmt: skip
        assert (plan.precision, plan.recompute, plan.gpu.name) == ("fp32", setting.recompute, "cpu-core")
        assert plan.sharding == ("distributed_optimizer" if setting.layout.has_distributed_optimizer else "none")
        assert not plan.overlaps_grad_reduce
        assert run.step_time_s == pytest.approx(0.5)
