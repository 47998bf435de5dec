"""The goodput of a layout: what a save costs, which interval follows, and days with their spread."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_hammer.model.accounting import ParallelLayout, count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.decisions.checkpoint_interval import SaveCost, estimate_run_s
from megatron_hammer.scaling.decisions.failures import FailureRate
from megatron_hammer.scaling.decisions.goodput import (
    Operations,
    build_save_cost,
    choose_save_steps,
    draw_step_s,
    estimate_goodput,
)
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.report.projection_file import SavedRow

LLAMA3_405B = replace(
    PRESETS["llama3-70b"].model, num_layers=126, hidden_size=16_384, num_attention_heads=128, ffn_hidden_size=53_248
)
LLAMA3_RATE = FailureRate(per_gpu_day=419 / 54 / 16_384)


def build_row(num_gpus: int = 16_384, step_time_s: float = 10.0, model: ModelShape = LLAMA3_405B) -> SavedRow:
    plan = Plan(
        model=model, layout=ParallelLayout(data_parallel_size=num_gpus), gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"), seq_length=8192, micro_batch_size=1, global_batch_size=2048,
    )  # fmt: skip
    return SavedRow(
        row_id=f"{num_gpus}-1", num_gpus=num_gpus, rank=1, plan=plan, step_time_s=step_time_s,
        low_s=0.9 * step_time_s, high_s=1.2 * step_time_s,
    )  # fmt: skip


def test_llama3_405b_keeps_what_was_published() -> None:
    """Llama 3, section 3.3.4: more than 90 % effective training time, at one interruption every 3 h."""
    good = estimate_goodput(build_row(), None, Operations(failure_rate=LLAMA3_RATE))
    assert good.mtbf_s / 3600 == pytest.approx(3.09, abs=0.01)
    assert 0.90 < good.goodput_ratio < 0.91  # of a step of 10 s; docs/scaling.md quotes it
    assert good.days is None
    # 14 bytes for each parameter at 2 TB/s.
    assert good.checkpoint_bytes == 14 * count_parameters(LLAMA3_405B)
    assert good.cost.write_s == pytest.approx(good.checkpoint_bytes / 1.966e12, rel=1e-3)


def test_the_interval_is_the_best_of_all_whole_numbers_of_steps() -> None:
    for step_s, cost, mtbf_s in (
        (10.0, SaveCost(write_s=60.0, stall_s=60.0, down_s=900.0), 7200.0),
        (300.0, SaveCost(write_s=20.0, stall_s=20.0, down_s=900.0), 7200.0),
        (3.0, SaveCost(write_s=500.0, stall_s=4.0, down_s=900.0), 3600.0),
        (7.0, SaveCost(write_s=100.0, stall_s=0.0, down_s=900.0), 50_000.0),
    ):
        found = choose_save_steps(step_s, cost, mtbf_s)
        tried = [steps for steps in range(1, 3000) if steps * step_s >= cost.lag_s]
        best = min(tried, key=lambda steps: estimate_run_s(1.0, steps * step_s, cost, mtbf_s))
        times = [estimate_run_s(1.0, steps * step_s, cost, mtbf_s) for steps in (found, best)]
        assert times[0] <= times[1] * 1.0005
        assert found * step_s >= cost.lag_s, "the next save would begin before this one is complete"


def test_equal_intervals_are_within_their_limit() -> None:
    good = estimate_goodput(build_row(), None, Operations(failure_rate=LLAMA3_RATE))
    low, high = good.equal_steps
    assert low < good.save_interval_steps < high
    best = estimate_run_s(1.0, good.save_interval_steps * 10.0, good.cost, good.mtbf_s)
    for steps, is_equal in ((low, True), (low - 1, False), (high, True), (high + 1, False)):
        if steps:
            assert (estimate_run_s(1.0, steps * 10.0, good.cost, good.mtbf_s) <= 1.005 * best) == is_equal


def test_days_have_the_spread_of_steps_clusters_and_chance() -> None:
    tokens = 2048 * 8192 * 100_000  # 11.57 days of steps
    known = estimate_goodput(build_row(), tokens, Operations(failure_rate=LLAMA3_RATE))
    assert known.ideal_days == pytest.approx(1e6 / 86_400)
    assert known.days is not None
    assert known.days_interval is not None
    assert known.num_failures is not None
    assert known.days == pytest.approx(known.ideal_days / known.goodput_ratio, rel=0.02)
    assert known.num_failures == pytest.approx(known.days * 86_400 / known.mtbf_s, rel=0.02)
    # The band of the step alone is 0.9 to 1.2.
    assert known.days_interval.low / known.days == pytest.approx(0.9, abs=0.02)
    assert known.days_interval.high / known.days == pytest.approx(1.2, abs=0.02)
    spread = estimate_goodput(build_row(), tokens, Operations())
    assert spread.days is not None
    assert spread.days_interval is not None
    assert spread.days_interval.high / spread.days > known.days_interval.high / known.days
    assert spread.mtbf_s_interval.low < spread.mtbf_s < spread.mtbf_s_interval.high
    assert estimate_goodput(build_row(), tokens, Operations()) == spread


def test_asynchronous_saves_stop_training_for_the_copy_only() -> None:
    num_bytes = 16_000 * 12_000_000_000
    blocking = build_save_cost(num_bytes, 16_000, Operations(storage_bytes_per_s=1e12))
    assert (blocking.write_s, blocking.stall_s, blocking.lag_s) == (192.0, 192.0, 0.0)
    assert blocking.down_s == 600 + 300 + 192
    copied = build_save_cost(num_bytes, 16_000, Operations(storage_bytes_per_s=1e12, has_async_save=True))
    assert (copied.write_s, copied.stall_s, copied.lag_s) == (192.0, 1.0, 191.0)
    told = build_save_cost(num_bytes, 16_000, Operations(storage_bytes_per_s=1e12, has_async_save=True, stall_s=7.0))
    assert told.stall_s == 7.0
    longer = build_save_cost(num_bytes, 16_000, Operations(storage_bytes_per_s=1e12, stall_s=500.0))
    assert (longer.write_s, longer.stall_s) == (500.0, 500.0)


def test_a_run_that_makes_no_progress_says_so() -> None:
    row = build_row(step_time_s=40_000.0)
    good = estimate_goodput(row, 10**13, Operations(failure_rate=replace(LLAMA3_RATE, per_gpu_day=0.05)))
    assert good.problem is not None
    assert good.problem.startswith(
        "row 16384-1: a step, a save and a restart must fit between two failures, got step=40,0"
    )
    assert good.days is None


def test_clusters_on_which_the_run_never_ends_are_in_the_band() -> None:
    """Between two infinite times, an interpolated percentile would be no number."""
    wide = FailureRate(per_gpu_day=2e-3, log_deviation=3.0, num_sources=5)
    good = estimate_goodput(build_row(step_time_s=600.0), 2048 * 8192 * 10_000, Operations(failure_rate=wide))
    assert good.problem is None
    assert good.days_interval is not None
    assert good.days_interval.low < (good.days or 0.0)
    assert math.isinf(good.days_interval.high)


def test_a_short_run_is_saved_once() -> None:
    good = estimate_goodput(build_row(num_gpus=8, model=PRESETS["llama3-8b"].model), 2048 * 8192 * 50, Operations())
    assert good.save_interval_steps == 50
    assert good.num_spare_nodes == 1  # also the rarest failure needs a node that is not in repair


def test_drawn_steps_have_the_band_of_the_prediction() -> None:
    drawn = draw_step_s(build_row(), np.random.default_rng(0), 100_000)
    assert np.percentile(drawn, [10, 50, 90]) == pytest.approx([9.0, 10.0, 12.0], rel=0.01)
    assert math.isfinite(drawn.max())
