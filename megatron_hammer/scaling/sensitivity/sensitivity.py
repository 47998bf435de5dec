"""What one change at a time does to a study: to its time, to its best layout, and to the ranking of its layouts.

The best layout is here the fastest one of those with the fewest cautions, and not the one to start from: that one is
chosen between ties, and a choice that flips is no effect of the change.
Each variation is searched anew, and the layouts that were best before it are predicted again under it. Both predictions
share most of their errors, so their ratio is known better than either time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.projection import Projection, SizeProjection
from megatron_hammer.scaling.search.search import EstimateMemory, Search, build_search
from megatron_hammer.scaling.search.search_space import SearchSpace
from megatron_hammer.scaling.search.standing import choose_fastest
from megatron_hammer.scaling.sensitivity.variations import Case, Variation, apply_variation

MOST_REMEMBERED = 100_000  # plans; one takes about 1 KB
MOST_COPIES = 64  # layouts that differ only in how stages share the layers and in how many ranks share a copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A study under one variation. problem: why it has no result, and then the other fields are None.

    time_ratio: seconds per token over those of the base, minus one. kept: the base's best layout under the variation;
    None if it does not fit or would not start. kept_time_ratio: as time_ratio, of that layout. gpu_time_ratio: as
    time_ratio, for the seconds of all GPUs together, which cost and energy follow. place: rank of the kept layout among
    the layouts found (1: still the best); None if it is below all of them, or not kept. rank_correlation: Kendall's
    tau-b of the times of the base's layouts before and after; None with fewer than two of them.
    """

    variation: Variation
    problem: str | None = None
    num_gpus: int | None = None
    best: Projection | None = None
    time_ratio: float | None = None
    gpu_time_ratio: float | None = None
    kept: Projection | None = None
    kept_time_ratio: float | None = None
    place: int | None = None
    rank_correlation: float | None = None

    @property
    def loss_ratio(self) -> float | None:
        """How much slower the old best layout is than the new best one; 0 if it is as fast."""
        if self.kept_time_ratio is None or self.time_ratio is None:
            return None
        # A search shows one layout of each family, so another member of the family may be faster by a hair.
        return max(0.0, (1 + self.kept_time_ratio) / (1 + self.time_ratio) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """The base with its best layouts, and an outcome for each variation in their order."""

    case: Case
    base: SizeProjection
    outcomes: tuple[Outcome, ...]


def estimate_sensitivity(
    case: Case, variations: Sequence[Variation], report: Callable[[str], None] = lambda _: None
) -> Sensitivity:
    """Search the base and every variation of it. report: called with each label before its search.

    Raises ConfigError if nothing fits in the base. A variation that cannot be applied has its problem in its outcome.
    """
    report("base")
    estimate = _remember_memory(case)
    base = _sort_by_time(_build_search(case, estimate).search_plans(case.study, case.num_gpus))
    if base.best is None:
        raise ConfigError(base.problem or "gpus: must hold the model. Use more.")
    outcomes = []
    for variation in variations:
        report(variation.label)
        try:
            varied = apply_variation(case, variation)
        except ConfigError as error:
            outcomes.append(Outcome(variation=variation, problem=" ".join(error.problems)))
            continue
        outcomes.append(_find_outcome(variation, varied, base, _build_search(varied, estimate)))
    return Sensitivity(case=case, base=base, outcomes=tuple(outcomes))


def _remember_memory(case: Case) -> EstimateMemory:
    """The estimate of memory, once for each plan: most variations leave the memory of every plan as it is.

    No variation changes what memory depends on of the GPU and the cluster, so those of the case stand in for them.
    """
    remembered = lru_cache(maxsize=MOST_REMEMBERED)(estimate_heaviest_plan_stage)
    gpu, cluster = case.study.gpu, case.study.cluster
    return lambda plan: remembered(replace(plan, gpu=gpu, cluster=cluster))


def _build_search(case: Case, estimate: EstimateMemory) -> Search:
    return build_search(case.coefficients, estimate=estimate, choose=choose_fastest)


def _find_outcome(variation: Variation, varied: Case, base: SizeProjection, search: Search) -> Outcome:
    size = _sort_by_time(search.search_plans(varied.study, varied.num_gpus))
    if size.best is None or base.best is None:
        return Outcome(variation=variation, problem=size.problem)
    carried = [carry_plan(one.plan, varied, search).projection for one in base.projections]
    before_s = _find_token_s(base.best)
    kept = carried[0]
    time_ratio = _find_token_s(size.best) / before_s - 1
    return Outcome(
        variation=variation,
        num_gpus=varied.num_gpus,
        best=size.best,
        time_ratio=time_ratio,
        gpu_time_ratio=(1 + time_ratio) * varied.num_gpus / base.num_gpus - 1,
        kept=kept,
        kept_time_ratio=None if kept is None else _find_token_s(kept) / before_s - 1,
        place=None if kept is None else _find_place(kept, size),
        rank_correlation=_correlate_ranks(base.projections, carried),
    )


def _sort_by_time(size: SizeProjection) -> SizeProjection:
    return replace(size, projections=tuple(sorted(size.projections, key=_find_order)))


def _find_order(one: Projection) -> tuple[int, float]:
    """A layout with a caution, such as memory close to the limit, is behind all that have none."""
    return len(one.standing.cautions), one.step.total_s


def _find_token_s(projection: Projection) -> float:
    return projection.step.total_s / projection.plan.tokens_per_step


def _find_place(kept: Projection, size: SizeProjection) -> int | None:
    slower = [one for one in size.projections if _find_order(one) >= _find_order(kept)]
    return 1 + len(size.projections) - len(slower) if slower else None


def _correlate_ranks(before: Sequence[Projection], after: Sequence[Projection | None]) -> float | None:
    """Kendall's tau-b of the times of those layouts that are in both."""
    pairs = [
        (one.step.total_s, other.step.total_s) for one, other in zip(before, after, strict=True) if other is not None
    ]
    if len(pairs) < 2:
        return None
    first, second = (np.sign(np.subtract.outer(times, times)) for times in zip(*pairs, strict=True))
    scale = float(np.sqrt(np.sum(first**2) * np.sum(second**2)))
    return float(np.sum(first * second)) / scale if scale else None


class CarriedPlan(NamedTuple):
    """A plan's layout in another study. projection: None if it does not start or fit.

    least_memory_bytes: what it would need of a GPU where it does not fit; None where it does not start.
    """

    projection: Projection | None
    least_memory_bytes: int | None


def carry_plan(plan: Plan, case: Case, search: Search) -> CarriedPlan:
    """The same layout in another study, with as many replicas as its GPUs allow.

    It is found by a search with nothing else allowed, so that all rules are those of the search.
    """
    layout = plan.layout
    ranks = layout.world_size // layout.data_parallel_size
    if case.num_gpus % ranks:
        return CarriedPlan(None, None)
    layout = replace(layout, data_parallel_size=case.num_gpus // ranks)
    study = replace(case.study, space=_restrict(plan, case.study.space), num_best=MOST_COPIES)
    size = search.search_plans(study, case.num_gpus)
    same = (layout, plan.shard_size)
    found = next((one for one in size.projections if (one.plan.layout, one.plan.shard_size) == same), None)
    return CarriedPlan(found, size.least_memory_bytes)


def _restrict(plan: Plan, space: SearchSpace) -> SearchSpace:
    layout = plan.layout
    return replace(
        space,
        tensor_model_parallel_sizes=(layout.tensor_model_parallel_size,),
        pipeline_model_parallel_sizes=(layout.pipeline_model_parallel_size,),
        virtual_pipeline_model_parallel_sizes=(layout.virtual_pipeline_model_parallel_size,),
        context_parallel_sizes=(layout.context_parallel_size,),
        expert_model_parallel_sizes=(layout.expert_model_parallel_size,),
        expert_tensor_parallel_sizes=(layout.expert_tp,) if plan.model.moe is not None else None,
        micro_batch_sizes=(plan.micro_batch_size,),
        recomputes=(plan.recompute,),
        shardings=(plan.sharding,),
    )
