"""Goodput: the share of a run's time that makes progress, and the save interval, spares and days that follow from it.

The memory model's checkpoint over a storage bandwidth gives the cost of a save, published failure counts give the time
between failures (failures.py), and Daly's formula gives the interval (checkpoint_interval.py). Not in it: evaluation,
planned maintenance, slow machines that do not fail, and waiting for data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.checkpoint_size import estimate_checkpoint_bytes
from megatron_hammer.scaling.decisions.checkpoint_interval import (
    SaveCost,
    count_spares,
    draw_run_s,
    estimate_run_s,
    find_best_interval_s,
)
from megatron_hammer.scaling.decisions.failures import FailureRate, estimate_failure_rate
from megatron_hammer.scaling.evidence.layout_ranking import BAND_Z
from megatron_hammer.scaling.loss_law.law import Interval
from megatron_hammer.scaling.report.projection_file import SavedRow

SECONDS_PER_DAY = 86_400.0
# Of storage for each GPU of the job. Two published systems: 2 TB/s sustained for 16,384 GPUs (Llama 3, arXiv
# 2407.21783, section 3.3.1), and BLOOM's 2.3 TB in 40 s from 384 GPUs.
STORAGE_BYTES_PER_S_PER_GPU = 0.12e9
# Into pinned host memory over PCIe 3.0 x16; newer buses are faster, but the GPUs of a node share the host's memory.
HOST_COPY_BYTES_PER_S = 12e9
# MegaScale (arXiv 2402.15627) detects and diagnoses in under 10 minutes and trains again within 15; the first is also
# Megatron's default of --distributed-timeout-minutes.
DETECTION_S, RESTART_S = 600.0, 300.0
REPAIR_HOURS = 24.0  # an assumption: no published time
SPARES_CONFIDENCE = 0.95  # that one is free at a failure
NUM_SAMPLES = 4000
BAND = (10.0, 50.0, 90.0)  # percentiles; the outer two are those of a step's band
MOST_STEPS = 1e12  # of an interval; more than any run has
EQUAL_RATIO = 1.005  # intervals whose run is longer by less than this are as good as the best one
LEAST_GOODPUT_RATIO = 0.01  # below, a run does not end in practice


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """How a cluster is run. None: the default of each size (storage), or what follows from the size of a save."""

    storage_bytes_per_s: float | None = None
    has_async_save: bool = False
    stall_s: float | None = None
    detection_s: float = DETECTION_S
    restart_s: float = RESTART_S
    repair_hours: float = REPAIR_HOURS
    failure_rate: FailureRate = field(default_factory=estimate_failure_rate)
    seed: int = 0

    def storage_bytes_per_s_at(self, num_gpus: int) -> float:
        return self.storage_bytes_per_s or STORAGE_BYTES_PER_S_PER_GPU * num_gpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """One layout with failures. Days are None without a token budget, `problem` is None where the run ends."""

    row: SavedRow
    checkpoint_bytes: int
    cost: SaveCost
    load_s: float
    mtbf_s: float
    mtbf_s_interval: Interval
    save_interval_steps: int
    equal_steps: tuple[int, int]  # intervals that are as good as the best one (EQUAL_RATIO)
    save_interval_steps_interval: tuple[int, int]  # the best interval at both ends of mtbf_s_interval
    goodput_ratio: float
    num_spare_nodes: int
    ideal_days: float | None = None
    days: float | None = None
    days_interval: Interval | None = None
    num_failures: float | None = None
    problem: str | None = None


def estimate_goodput(row: SavedRow, train_tokens: int | None, operations: Operations) -> Goodput:
    """The goodput of a row of a projection, with days for a budget of tokens. Seeded: the same row gives the same."""
    plan, step_s = row.plan, row.step_time_s
    num_bytes = estimate_checkpoint_bytes(
        count_parameters(plan.model), element_bytes=4 if plan.precision == "fp32" else 2
    )
    load_s = num_bytes / operations.storage_bytes_per_s_at(row.num_gpus)
    cost = build_save_cost(num_bytes, row.num_gpus, operations)
    random = np.random.default_rng(operations.seed)
    rates = operations.failure_rate.draw(random, NUM_SAMPLES) * row.num_gpus / SECONDS_PER_DAY
    mtbf_s = SECONDS_PER_DAY / (operations.failure_rate.per_gpu_day * row.num_gpus)
    mtbfs = Interval(*(float(1 / rate) for rate in np.percentile(rates, BAND[::-2])))
    num_steps = math.inf if train_tokens is None else -(-train_tokens // plan.tokens_per_step)
    # A run always ends in a save, so an interval beyond its end means that one alone.
    steps, *ends = (
        int(min(num_steps, choose_save_steps(step_s, cost, mean_s))) for mean_s in (mtbf_s, mtbfs.low, mtbfs.high)
    )
    ratio = 1 / estimate_run_s(1.0, steps * step_s, cost, mtbf_s)
    nodes_out = operations.repair_hours * 3600 / mtbf_s
    return Goodput(
        row=row,
        checkpoint_bytes=num_bytes,
        cost=cost,
        load_s=load_s,
        mtbf_s=mtbf_s,
        mtbf_s_interval=mtbfs,
        save_interval_steps=steps,
        equal_steps=_find_equal_steps(steps, min(num_steps, 16 * steps), step_s, cost, mtbf_s),
        save_interval_steps_interval=(ends[0], ends[1]),
        goodput_ratio=ratio,
        # One more than are in repair, because every failure takes the place of a node: without a free spare, the job
        # waits for the repair and not only for the restart.
        num_spare_nodes=1 + count_spares(nodes_out, SPARES_CONFIDENCE),
        **_estimate_days(row, train_tokens, steps, cost, mtbf_s, rates, random, ratio),
        problem=None if ratio >= LEAST_GOODPUT_RATIO else _describe_stuck_run(row, cost, mtbf_s),
    )


def build_save_cost(num_bytes: int, num_gpus: int, operations: Operations) -> SaveCost:
    """Every GPU writes its share at once, as Megatron's fully parallel saving does by default."""
    write_s = num_bytes / operations.storage_bytes_per_s_at(num_gpus)
    copy_s = num_bytes / num_gpus / HOST_COPY_BYTES_PER_S
    stall_s = operations.stall_s
    if stall_s is None:
        stall_s = min(copy_s, write_s) if operations.has_async_save else write_s
    # A blocking save takes at least as long as it stops training, whatever the bandwidth.
    return SaveCost(
        write_s=max(write_s, stall_s),
        stall_s=stall_s if operations.has_async_save else max(write_s, stall_s),
        down_s=operations.detection_s + operations.restart_s + write_s,
    )


def choose_save_steps(step_s: float, cost: SaveCost, mtbf_s: float) -> int:
    """--save-interval: Daly's interval in whole steps. A save must be complete before the next one begins."""
    interval_s = max(find_best_interval_s(cost.stall_s, mtbf_s), cost.lag_s, step_s)
    best = min(interval_s / step_s, MOST_STEPS)
    least = _find_least_steps(step_s, cost)
    candidates = {max(least, math.floor(best)), max(least, math.ceil(best))}
    return min(sorted(candidates), key=lambda steps: estimate_run_s(1.0, steps * step_s, cost, mtbf_s))


def _find_least_steps(step_s: float, cost: SaveCost) -> int:
    """The fewest steps between two saves that do not overlap."""
    return max(1, math.ceil(min(cost.lag_s / step_s, MOST_STEPS)))


def _find_equal_steps(best: int, most: float, step_s: float, cost: SaveCost, mtbf_s: float) -> tuple[int, int]:
    """The range around the best interval, up to `most`, within EQUAL_RATIO of its run.

    The cost has one minimum, so it is bisected.
    """
    least = min(best, _find_least_steps(step_s, cost))
    limit_s = EQUAL_RATIO * estimate_run_s(1.0, best * step_s, cost, mtbf_s)

    def is_equal(steps: int) -> bool:
        return estimate_run_s(1.0, steps * step_s, cost, mtbf_s) <= limit_s

    return _bisect(best, least, is_equal), _bisect(best, int(most), is_equal)


def _bisect(inside: int, end: int, is_inside: Callable[[int], bool]) -> int:
    """The integer farthest from `inside` towards `end` for which it still holds."""
    if is_inside(end):
        return end
    while abs(end - inside) > 1:
        middle = (inside + end) // 2
        inside, end = (middle, end) if is_inside(middle) else (inside, middle)
    return inside


def _estimate_days(
    row: SavedRow,
    train_tokens: int | None,
    steps: int,
    cost: SaveCost,
    mtbf_s: float,
    rates: np.ndarray,
    random: np.random.Generator,
    ratio: float,
) -> dict[str, Any]:
    """Days of a run to a budget: expected, and with the spread of the step time, of the cluster and of chance."""
    if train_tokens is None or ratio < LEAST_GOODPUT_RATIO:
        return {}
    num_steps = -(-train_tokens // row.plan.tokens_per_step)
    work_s = num_steps * row.step_time_s
    totals_s = _draw_total_s(row, np.full(NUM_SAMPLES, float(num_steps)), steps, cost, rates, random)
    low, middle, high = (days / SECONDS_PER_DAY for days in find_percentiles(totals_s, BAND))
    expected_s = estimate_run_s(work_s, steps * row.step_time_s, cost, mtbf_s)
    return {
        "ideal_days": work_s / SECONDS_PER_DAY,
        "days": middle,
        "days_interval": Interval(low, high),
        "num_failures": expected_s / mtbf_s,
    }


def draw_days(good: Goodput, num_steps: np.ndarray, operations: Operations) -> np.ndarray:
    """[n]: days of n runs, each of its own number of steps; inf where that is infinite or the run does not end."""
    random = np.random.default_rng(operations.seed)
    rates = operations.failure_rate.draw(random, len(num_steps)) * good.row.num_gpus / SECONDS_PER_DAY
    is_finite = np.isfinite(num_steps)
    steps = np.where(is_finite, num_steps, 1.0)
    totals_s = _draw_total_s(good.row, steps, good.save_interval_steps, good.cost, rates, random)
    return np.where(is_finite, totals_s / SECONDS_PER_DAY, np.inf)


def _draw_total_s(
    row: SavedRow,
    num_steps: np.ndarray,
    interval_steps: int,
    cost: SaveCost,
    rates: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    step_s = draw_step_s(row, random, len(num_steps))
    return draw_run_s(num_steps * step_s, interval_steps * step_s, cost, 1 / rates, random)


def find_percentiles(values: np.ndarray, percentiles: Sequence[float]) -> list[float]:
    """Of values that may be infinite, for runs that do not end. Between two of those, numpy's default gives NaN."""
    return [float(value) for value in np.percentile(values, percentiles, method="nearest")]


def draw_step_s(row: SavedRow, random: np.random.Generator, num_samples: int) -> np.ndarray:
    """[n]: step times whose 10th and 90th percentile are the ends of the band, and whose median is the prediction."""
    steps = random.standard_normal(num_samples)
    up, down = math.log(row.high_s / row.step_time_s), math.log(row.step_time_s / row.low_s)
    return row.step_time_s * np.exp(steps / BAND_Z * np.where(steps > 0, up, down))


def _describe_stuck_run(row: SavedRow, cost: SaveCost, mtbf_s: float) -> str:
    return (
        f"row {row.row_id}: a step, a save and a restart must fit between two failures, got "
        f"step={row.step_time_s:,.1f} s, save={cost.stall_s:,.0f} s, restart={cost.down_s:,.0f} s, failures every "
        f"{mtbf_s:,.3g} s. Use faster storage, --async-save, or fewer GPUs."
    )
