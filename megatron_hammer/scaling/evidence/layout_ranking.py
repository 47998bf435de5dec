"""Runs of one job in several layouts: what following the prediction would have cost, and how errors are shared.

Two layouts of one model on one machine share most of the error of their predictions, so a ranking is better than the
band about each time. The correlation of two errors is `layout_correlation` to the power of the distance between the
layouts: sizes that are doubled or halved, and other choices that differ. `search/standing.py` uses it.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from megatron_hammer.scaling.plan import RECOMPUTE_MODULES, Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun

RANKING_TOLERANCE_RATIO = 0.05
# What a search chooses. Runs that differ in anything else of a plan are different jobs.
LAYOUT_FIELDS = (
    "layout", "micro_batch_size", "recompute", "recompute_modules", "recompute_num_layers", "num_offloaded_layers",
    "offload_modules", "optimizer_offload_ratio", "sharding", "shard_size", "overlaps_param_gather",
    "overlaps_tensor_parallel",
)  # fmt: skip
JOB_FIELDS = tuple(field.name for field in fields(Plan) if field.name not in LAYOUT_FIELDS)
BAND_Z = 1.2816  # a normal error is within so many standard deviations in 80 % of all cases, as the band says
LEAST_PAIRS = 30  # with fewer pairs of layouts, the correlation stays that of the start
LOWEST_CORRELATION, HIGHEST_CORRELATION = 0.05, 0.995


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """A group of runs that differ only in their layout, and what following the prediction would have cost."""

    source: str
    description: str
    num_layouts: int
    predicted_best: MeasuredRun
    measured_best: MeasuredRun
    loss_ratio: float  # measured time of the layout predicted to be best over that of the measured best, minus one


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingSummary:
    """The losses of all groups."""

    num_groups: int
    num_within_5_percent: int
    mean_loss_ratio: float
    median_loss_ratio: float
    worst_loss_ratio: float


def group_by_job(runs: Sequence[MeasuredRun]) -> list[list[int]]:
    """The positions of the runs of each job that was run in at least two layouts."""
    jobs: dict[Hashable, list[int]] = defaultdict(list)
    for position, run in enumerate(runs):
        plan = run.plan
        key = (run.source, plan.layout.world_size, *(getattr(plan, name) for name in JOB_FIELDS))
        jobs[key].append(position)
    return [group for group in jobs.values() if len({_identify_layout(runs[one].plan) for one in group}) > 1]


def _identify_layout(plan: Plan) -> Hashable:
    return tuple(getattr(plan, name) for name in LAYOUT_FIELDS)


def rank_layouts(runs: Sequence[MeasuredRun], steps: Sequence[StepTime]) -> list[Ranking]:
    """One ranking for each job that was run in several layouts. A layout that was run twice has its mean time."""
    return [_rank_group([(runs[one], steps[one]) for one in group]) for group in group_by_job(runs)]


def _rank_group(group: Sequence[tuple[MeasuredRun, StepTime]]) -> Ranking:
    layouts: dict[Hashable, list[tuple[MeasuredRun, StepTime]]] = defaultdict(list)
    for run, step in group:
        layouts[_identify_layout(run.plan)].append((run, step))
    times = {key: fmean(run.step_time_s for run, _ in same) for key, same in layouts.items()}
    predicted = min(layouts, key=lambda key: layouts[key][0][1].total_s)
    measured = min(times, key=lambda key: times[key])
    run = layouts[predicted][0][0]
    plan = run.plan
    return Ranking(
        source=run.source,
        description=(
            f"{run.model} x{plan.layout.world_size} {plan.gpu.name} {plan.precision}, batch {plan.global_batch_size}"
        ),
        num_layouts=len(layouts),
        predicted_best=run,
        measured_best=layouts[measured][0][0],
        loss_ratio=times[predicted] / times[measured] - 1,
    )


def summarise_rankings(rankings: Sequence[Ranking]) -> RankingSummary | None:
    """None if no job was run in several layouts."""
    losses = sorted(one.loss_ratio for one in rankings)
    if not losses:
        return None
    return RankingSummary(
        num_groups=len(losses),
        num_within_5_percent=sum(loss <= RANKING_TOLERANCE_RATIO for loss in losses),
        mean_loss_ratio=fmean(losses),
        median_loss_ratio=float(np.median(losses)),
        worst_loss_ratio=losses[-1],
    )


def describe_choice(plan: Plan) -> str:
    """What a search chooses of a plan, without what is not used: TP8 PP4x5 DP16, micro-batch 2, full recomputation."""
    layout = plan.layout
    words = [f"TP{layout.tensor_model_parallel_size}"] if layout.tensor_model_parallel_size > 1 else []
    if layout.pipeline_model_parallel_size > 1:
        chunks = layout.virtual_pipeline_model_parallel_size
        words.append(f"PP{layout.pipeline_model_parallel_size}{f'x{chunks}' if chunks > 1 else ''}")
    if layout.context_parallel_size > 1:
        words.append(f"CP{layout.context_parallel_size}")
    if layout.expert_model_parallel_size > 1:
        words.append(f"EP{layout.expert_model_parallel_size}")
    parts = [" ".join([*words, f"DP{layout.data_parallel_size}"]), f"micro-batch {plan.micro_batch_size}"]
    if plan.recompute != "none":
        parts.append(f"{plan.recompute} recomputation")
    if plan.sharding != "none":
        name = {"fsdp": "FSDP", "distributed_optimizer": "distributed optimizer"}[plan.sharding]
        parts.append(name if plan.shard_size is None else f"{name} over {plan.shard_size}")
    if plan.overlaps_tensor_parallel:
        parts.append("TP overlapped")
    return ", ".join(parts)


def build_layout_features(plan: Plan) -> list[float]:
    """A layout as a point: the distance of two is the sum of the absolute differences of their coordinates.

    A size counts its doublings. Another choice has a coordinate for each value, 0.5 or 0, so two that differ are 1
    apart.
    """
    layout = plan.layout
    sizes = (
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        # Without experts, it follows the tensor-parallel size and changes nothing.
        layout.expert_tp if plan.model.moe is not None else 1,
        plan.micro_batch_size,
        # By how much the group that shards is smaller than all ranks.
        max(1.0, layout.dense_shard_size / (plan.shard_size or layout.dense_shard_size)),
    )
    is_even = (layout.num_layers_first_stage, layout.num_layers_last_stage) == (None, None)
    choices = (
        *(plan.recompute == one for one in ("none", "selective", "full")),
        *(0.5 * (plan.recompute == "selective" and one in plan.recompute_modules) for one in RECOMPUTE_MODULES),
        *(plan.sharding == one for one in ("none", "distributed_optimizer", "fsdp")),
        *(is_even, not is_even),
        *(layout.accounts_for_loss, not layout.accounts_for_loss),
        *(plan.overlaps_tensor_parallel, not plan.overlaps_tensor_parallel),
    )
    return [*(math.log2(size) for size in sizes), *(0.5 * is_chosen for is_chosen in choices)]


def measure_layout_distances(plans: Sequence[Plan]) -> NDArray[np.float64]:
    """The distance of every two layouts: [len(plans), len(plans)]."""
    points = np.array([build_layout_features(plan) for plan in plans])
    distances = np.zeros((len(plans), len(plans)))
    for coordinate in points.T:
        distances += np.abs(coordinate[:, None] - coordinate[None, :])
    return distances


def estimate_layout_correlation(
    runs: Sequence[MeasuredRun], errors: Sequence[float], half_widths: Sequence[float], *, start: float
) -> float:
    """The correlation of the errors of two layouts that are one step apart, such as a size doubled.

    errors: log(predicted / measured) of runs that the fit had not seen; half_widths: of their bands, as logarithms. The
    result is the value with which 80 % of the differences between two errors of a job are within the interval that it
    gives them. A job's pairs together weigh the square root of their number. Jobs of one node do not count: those of
    the tables are small models on 2 to 8 GPUs, whose times scatter for reasons of the host. `start` is returned for too
    few pairs.
    """
    differences, variances, distances, weights = [], [], [], []
    for group in group_by_job(runs):
        plan = runs[group[0]].plan
        if plan.layout.world_size <= plan.cluster.gpus_per_node:
            continue
        apart = measure_layout_distances([runs[one].plan for one in group])
        pairs = [pair for pair in combinations(range(len(group)), 2) if apart[pair] > 0]
        for first, second in pairs:
            one, other = group[first], group[second]
            differences.append(abs(errors[one] - errors[other]))
            variances.append((half_widths[one] ** 2 + half_widths[other] ** 2) / BAND_Z**2)
            distances.append(apart[first, second])
            weights.append(len(pairs) ** -0.5)
    if len(differences) < LEAST_PAIRS:
        return start
    arrays = [np.array(values) for values in (differences, variances, distances, weights)]

    def cover(correlation: float) -> float:
        observed, variance, distance, weight = arrays
        limit = BAND_Z * np.sqrt(variance * (1 - correlation**distance))
        return float(np.sum(weight * (observed <= limit)) / np.sum(weight))

    # The interval narrows as the correlation grows. Bisection, because the covered share moves in steps.
    low, high = LOWEST_CORRELATION, HIGHEST_CORRELATION
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cover(middle) >= 0.8 else (low, middle)
    return (low + high) / 2
