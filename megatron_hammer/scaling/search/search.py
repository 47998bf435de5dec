"""The fastest plans of every size that fit in memory: all candidates of search_space.py, except those that cannot win.

Plans are grouped into families, which have the parallel sizes and the sharding in common. One plan of a family is
shown, and its near copies are counted. standing.py chooses the plan to start from.

Candidates are tried in the order of a lower bound of their time (_list_bounds_s). When the bound exceeds the slowest
family to be shown and every possible tie, all remaining plans are slower, so neither their memory nor their time is
computed. These plans are left out before that, because they cannot win:
- more recomputation than a plan needs to fit: it adds work and saves only memory;
- overlap switched off although it is possible: overlap only hides time;
- context parallelism beside micro-batches of several samples: whole samples on each rank are the same work without the
  exchange of keys and values;
- larger micro-batches than one that did not fit with full recomputation: activations grow with them;
- an unsharded optimizer if sharding is allowed: it moves as many bytes (an all-reduce is a reduce-scatter and an
  all-gather), updates more parameters, and needs more memory.
test_search.py compares with a search that leaves out nothing. Ties are broken by the plan's own numbers, so the same
question always gets the same answer.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from megatron_hammer.model.accounting import ParallelLayout, StageMemory
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.layout import divisors
from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients
from megatron_hammer.scaling.cost.context_parallel import list_context_exchanges
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan import ContextExchange, ExpertOptions, Plan, Sharding, StepTime
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.projection import Projection, SizeProjection, Standing, Study, describe_plan
from megatron_hammer.scaling.search.published_reach import list_cautions
from megatron_hammer.scaling.search.search_space import (
    RECOMPUTES,
    Recomputation,
    SearchSpace,
    can_overlap_experts,
    can_overlap_tensor_parallel,
    describe_restrictions,
    has_quantized_parameters,
    is_cpu_host,
    list_dispatchers,
    list_layouts,
    list_micro_batch_sizes,
    list_recomputations,
    list_shard_sizes,
    list_shardings,
)
from megatron_hammer.scaling.search.standing import Choose, choose_start, find_widest_tie_ratio, rank_families

# Safety margin of the bound, for rounding and for parts that a predictor counts a little differently with and without
# pipeline stages: a plan is skipped only if this share of its bound is above the slowest of the best.
BOUND_MARGIN_RATIO = 0.98
# Of a layout with more micro-batch sizes than this, the largest that fits is found by bisection before any is bounded.
# A batch with many divisors has thousands, and most of them are far too large.
MOST_UNSORTED_SIZES = 16
# What every layer costs for each micro-batch, independent of the placement of other ranks.
LAYER_PARTS = ("matmul_s", "attention_s", "pointwise_s", "tensor_parallel_s", "context_parallel_s", "expert_parallel_s")
# Of equally fast plans, prefer the one that is closest to Megatron's defaults.
TIE_SHARDINGS: tuple[Sharding, ...] = ("distributed_optimizer", "none", "fsdp")
Predict = Callable[[Plan], StepTime]
EstimateMemory = Callable[[Plan], StageMemory]


class _Candidate(NamedTuple):
    """A plan before its recomputation is chosen. Sorted by its bound, then by its position in the list."""

    bound_s: float
    place: int
    plan: Plan  # of any micro-batch size
    micro_batch_size: int


class _Failure(NamedTuple):
    """The plan with the smallest memory among those that did not fit."""

    plan: Plan
    memory: StageMemory


class _Pool:
    """The plans found so far that may be shown, and the time beyond which no other one can be."""

    def __init__(self, num_families: int) -> None:
        self._num_families = num_families
        self._found: list[Projection] = []
        self._fastest_s: dict[Hashable, float] = {}  # by family
        self._best: StepTime | None = None
        self.limit_s = math.inf

    def add(self, projection: Projection) -> None:
        total_s = projection.step.total_s
        if total_s > self.limit_s:
            return
        self._found.append(projection)
        family = _identify_family(projection.plan)
        if total_s >= self._fastest_s.get(family, math.inf):
            return
        self._fastest_s[family] = total_s
        if self._best is None or total_s < self._best.total_s:
            self._best = projection.step
        if len(self._fastest_s) >= self._num_families:
            slowest_s = heapq.nsmallest(self._num_families, self._fastest_s.values())[-1]
            self.limit_s = max(slowest_s, self._best.total_s * find_widest_tie_ratio(self._best))

    def list_found(self) -> list[Projection]:
        """The fastest first."""
        found = [one for one in self._found if one.step.total_s <= self.limit_s]
        return sorted(found, key=lambda one: (one.step.total_s, _tie_key(one.plan)))


class Search:
    """Searches that share a cache: the time of a layer for each micro-batch size and layout of a layer."""

    def __init__(
        self,
        *,
        predict: Predict,
        estimate: EstimateMemory = estimate_heaviest_plan_stage,
        layout_correlation: float | None = None,
        choose: Choose = choose_start,
    ) -> None:
        """predict: step_time.predict_step with its coefficients; estimate: memory of its heaviest stage.

        layout_correlation: that of the coefficients, by default of the shipped ones. choose: which layout stands for a
        family, and which comes first.
        """
        self._predict = predict
        self._estimate = estimate
        self._correlation = layout_correlation or load_coefficients().layout_correlation
        self._choose = choose
        self._layer_times_s: dict[tuple[Any, ...], dict[int, float]] = {}
        self._exchanges: dict[tuple[Any, ...], ContextExchange] = {}

    def search_plans(self, study: Study, num_gpus: int) -> SizeProjection:
        """The study's best plans on this number of GPUs, or the reason why there are none, with a remedy."""
        batch = study.global_batch_size_at(num_gpus)
        fit = _Fit(study, self._estimate)
        candidates = sorted(self._list_candidates(study, num_gpus, batch, fit))
        projections = self._rank(study, self._find_fastest(study, candidates, fit))
        return SizeProjection(
            num_gpus=num_gpus,
            global_batch_size=batch,
            num_candidates=len(candidates),
            projections=projections,
            problem=None if projections else _describe_failure(study, num_gpus, batch, fit.least),
            least_memory_bytes=fit.least.memory.total_bytes if fit.least and not projections else None,
        )

    def _find_fastest(self, study: Study, candidates: Sequence[_Candidate], fit: "_Fit") -> list[Projection]:
        """Every plan that fits and is as fast as the slowest family shown or a possible tie; the fastest first."""
        pool = _Pool(study.num_best)
        for candidate in candidates:
            # Candidates are sorted by their bound, so all others are slower too.
            if candidate.bound_s * BOUND_MARGIN_RATIO > pool.limit_s:
                break
            fitting = fit.choose_recompute(replace(candidate.plan, micro_batch_size=candidate.micro_batch_size))
            if fitting is not None:
                plan, memory = fitting
                # What a dispatcher needs of memory is not modelled, so all of them fit.
                steps = [(self._predict(one), one) for one in _list_dispatched(study, plan)]
                step, plan = min(steps, key=lambda pair: pair[0].total_s)
                pool.add(Projection(plan=plan, step=step, memory=memory))
        return pool.list_found()

    def _rank(self, study: Study, found: Sequence[Projection]) -> tuple[Projection, ...]:
        if not found:
            return ()
        marked = [replace(one, standing=Standing(cautions=_list_study_cautions(study, one))) for one in found]
        return tuple(rank_families(marked, study.num_best, _identify_family, self._correlation, self._choose))

    def _list_candidates(self, study: Study, num_gpus: int, batch: int, fit: "_Fit") -> Iterator[_Candidate]:
        layouts = list_layouts(
            study.model,
            study.cluster,
            num_gpus=num_gpus,
            global_batch_size=batch,
            seq_length=study.seq_length,
            space=study.space,
        )
        place = 0
        for layout in layouts:
            all_sizes = _list_undivided_sizes(layout, list_micro_batch_sizes(layout, batch, study.space), study.space)
            for sharding in list_shardings(layout, study.cluster, study.space):
                built = self._choose_context_exchange(_build_plan(study, layout, sharding, batch))
                for shard_size in list_shard_sizes(layout, sharding, study.cluster):
                    plan = replace(built, shard_size=shard_size)
                    sizes = fit.drop_too_large(plan, all_sizes)
                    bounds_s = self._list_bounds_s(_list_dispatched(study, plan), sizes)
                    for size, bound_s in zip(sizes, bounds_s, strict=True):
                        yield _Candidate(bound_s, place, plan, size)
                        place += 1

    def _choose_context_exchange(self, plan: Plan) -> Plan:
        """The plan with the exchange between context-parallel ranks that is fastest with one sequence."""
        tp, cp = plan.layout.tensor_model_parallel_size, plan.layout.context_parallel_size
        key = (plan.model, plan.gpu, plan.cluster, plan.seq_length, plan.precision, tp, cp)
        if key not in self._exchanges:
            exchanges = list_context_exchanges(plan.model, tp, cp, plan.cluster)
            plans = [replace(plan, context_exchange=exchange) for exchange in exchanges]
            best = min(plans, key=self._predict_layer_s) if len(plans) > 1 else plans[0]
            self._exchanges[key] = best.context_exchange
        return replace(plan, context_exchange=self._exchanges[key])

    def _list_bounds_s(self, plans: Sequence[Plan], micro_batch_sizes: Sequence[int]) -> Iterator[float]:
        """Lower bounds of the step time: the plan's layers for every micro-batch, and the pipeline's ideal bubble.

        plans: the same one with each dispatcher, of which the fastest counts.
        A stage has num_layers / pp layers on average, and the slowest has at least as many. Filling and emptying the
        pipeline takes as long as (pp - 1) / vp micro-batches (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
        """
        plan, layout = plans[0], plans[0].layout
        pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
        layers, bubble = plan.model.num_layers / pp, (pp - 1) / vp
        per_rank = plan.global_batch_size // layout.data_parallel_size
        tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
        cut = (tp, cp, layout.expert_model_parallel_size, layout.expert_tp)
        run = (plan.model, plan.gpu, plan.cluster, plan.seq_length, plan.precision, plan.overlaps_tensor_parallel)
        known = [(self._layer_times_s.setdefault((*run, *cut, one.experts), {}), one) for one in plans]
        for size in micro_batch_sizes:
            for times_s, one in known:
                if size not in times_s:
                    times_s[size] = self._predict_layer_s(replace(one, micro_batch_size=size))
            yield min(times_s[size] for times_s, _ in known) * layers * (per_rank // size + bubble)

    def _predict_layer_s(self, plan: Plan) -> float:
        """LAYER_PARTS of one layer and micro-batch. All plans that split a layer like this one share the result."""
        layout = plan.layout
        ranks = layout.tensor_model_parallel_size * layout.context_parallel_size
        # The fewest replicas whose ranks are whole blocks of experts.
        dp = math.lcm(ranks, layout.expert_model_parallel_size * layout.expert_tp) // ranks
        alone = replace(
            layout,
            data_parallel_size=dp,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=1,
            num_layers_first_stage=None,
            num_layers_last_stage=None,
            accounts_for_embedding=False,
            accounts_for_loss=False,
        )
        step = self._predict(replace(plan, layout=alone, global_batch_size=plan.micro_batch_size * dp))
        return sum(getattr(step, name) for name in LAYER_PARTS) / plan.model.num_layers


def build_search(
    coefficients: Coefficients,
    *,
    estimate: EstimateMemory = estimate_heaviest_plan_stage,
    choose: Choose = choose_start,
) -> Search:
    """A search whose times and ties are those of these coefficients. estimate, choose: as in Search."""
    return Search(
        predict=partial(predict_step, coefficients=coefficients),
        estimate=estimate,
        layout_correlation=coefficients.layout_correlation,
        choose=choose,
    )


class _Fit:
    """Which plans fit in memory. Remembers those that did not, to skip plans that need more."""

    def __init__(self, study: Study, estimate: EstimateMemory) -> None:
        self._limit_bytes = study.memory_limit_bytes
        self._recomputes = list_recomputations(study.model, study.precision, study.cluster, study.space)
        self._estimate = estimate
        # Micro-batch sizes that did not fit, by layout, sharding and the ranks that share a copy.
        self._too_large: dict[tuple[ParallelLayout, Sharding, int | None], int] = {}
        self.least: _Failure | None = None

    def drop_too_large(self, plan: Plan, sizes: list[int]) -> list[int]:
        """The micro-batch sizes, in rising order, without those above the first that does not fit."""
        if len(sizes) <= MOST_UNSORTED_SIZES:
            return sizes
        smallest_memory = _recompute(plan, self._recomputes[-1])

        def is_too_large(size: int) -> bool:
            return self._try(replace(smallest_memory, micro_batch_size=size)) is None

        return sizes[: bisect_left(sizes, True, key=is_too_large)]

    def choose_recompute(self, plan: Plan) -> tuple[Plan, StageMemory] | None:
        """The plan with the least recomputation that makes it fit, and its heaviest stage. None if nothing does."""
        key = (plan.layout, plan.sharding, plan.shard_size)
        if plan.micro_batch_size >= self._too_large.get(key, plan.micro_batch_size + 1):
            return None
        # With a single choice, the first and the last one are the same.
        first, *middle, last = self._recomputes if len(self._recomputes) > 1 else self._recomputes * 2
        fitting = self._try(_recompute(plan, first))
        if fitting is not None:
            return fitting
        # The most recomputation is tried next: if even that does not fit, the ones in between need not be tried.
        smallest = self._try(_recompute(plan, last))
        if smallest is None:
            self._too_large[key] = plan.micro_batch_size
            return None
        tries = (self._try(_recompute(plan, recompute)) for recompute in middle)
        return next((fitting for fitting in tries if fitting is not None), smallest)

    def _try(self, plan: Plan) -> tuple[Plan, StageMemory] | None:
        memory = self._estimate(plan)
        if memory.total_bytes <= self._limit_bytes:
            return plan, memory
        if self.least is None or memory.total_bytes < self.least.memory.total_bytes:  # the first of equals
            self.least = _Failure(plan, memory)
        return None


def _build_plan(study: Study, layout: ParallelLayout, sharding: Sharding, global_batch_size: int) -> Plan:
    """The plan of a layout before its micro-batch and recomputation are chosen."""
    has_overlap = layout.dense_shard_size > 1 and not is_cpu_host(study.cluster)
    can_overlap_tp = can_overlap_tensor_parallel(layout, study.cluster)
    wants_overlap_tp = study.space.overlaps_tensor_parallel is not False
    plan = Plan(
        model=study.model,
        layout=layout if sharding != "none" else replace(layout, has_distributed_optimizer=False),
        gpu=study.gpu,
        cluster=study.cluster,
        seq_length=study.seq_length,
        micro_batch_size=1,
        global_batch_size=global_batch_size,
        precision=study.precision,
        recompute="none",
        has_quantized_parameters=has_quantized_parameters(study.precision, sharding, study.space),
        num_offloaded_layers=study.space.num_offloaded_layers,
        offload_modules=study.space.offload_modules,
        optimizer_offload_ratio=study.space.optimizer_offload_ratio,
        sharding=sharding,
        overlaps_grad_reduce=has_overlap,
        overlaps_param_gather=has_overlap and sharding != "none",
        overlaps_tensor_parallel=can_overlap_tp and wants_overlap_tp,
        gradient_bytes=study.gradient_bytes,
        vocab_divisible_by=study.vocab_divisible_by,
        experts=study.experts if study.model.moe is not None else ExpertOptions(),
    )
    return _list_dispatched(study, plan)[0]


def _list_dispatched(study: Study, plan: Plan) -> list[Plan]:
    """The plan with each dispatcher that the study names and its layout can use, overlapped where that is possible."""
    if study.model.moe is None:
        return [plan]
    plans = []
    for dispatcher in list_dispatchers(plan.layout, study.dispatchers):
        own = replace(plan, experts=replace(plan.experts, dispatcher=dispatcher, overlaps_communication=False))
        if study.space.overlaps_experts is not False and can_overlap_experts(own):
            own = replace(own, experts=replace(own.experts, overlaps_communication=True))
        plans.append(own)
    return plans


def _recompute(plan: Plan, recompute: Recomputation) -> Plan:
    """The plan with this recomputation, and without overlap that it makes impossible."""
    changed = replace(plan, recompute=recompute.granularity, recompute_modules=recompute.modules)
    if not plan.experts.overlaps_communication or can_overlap_experts(changed):
        return changed
    return replace(changed, experts=replace(plan.experts, overlaps_communication=False))


def _list_undivided_sizes(layout: ParallelLayout, sizes: Sequence[int], space: SearchSpace) -> list[int]:
    """The micro-batch sizes without those that can be shared out in place of the sequence.

    If p divides both, cp / p context ranks with p times the replicas and 1 / p of the micro-batch give every rank as
    many tokens, parameters and micro-batches. The space must allow both.
    """
    cp = layout.context_parallel_size
    allowed_cp, allowed_sizes = space.context_parallel_sizes, space.micro_batch_sizes

    def has_better_twin(size: int) -> bool:
        return any(
            (allowed_cp is None or cp // p in allowed_cp) and (allowed_sizes is None or size // p in allowed_sizes)
            for p in divisors(math.gcd(cp, size))
            if p > 1
        )

    return [size for size in sizes if not has_better_twin(size)]


def _identify_family(plan: Plan) -> Hashable:
    """What near copies have in common. They differ in micro-batch, chunks, split of the layers, recomputation
    and the size of the group that shards.

    They also differ in context parallelism: twice the context ranks with half the replicas and twice the micro-batch
    gives every rank as many tokens, parameters and bytes to send.
    """
    layout = plan.layout
    return (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.expert_tp,
        plan.sharding,
    )


def _list_study_cautions(study: Study, projection: Projection) -> tuple[str, ...]:
    return list_cautions(
        projection.plan,
        projection.memory.total_bytes,
        memory_limit_bytes=study.memory_limit_bytes,
        memory_margin_ratio=study.memory_margin_ratio,
    )


def _tie_key(plan: Plan) -> tuple[Any, ...]:
    """Between equally fast plans the one with fewer cuts, then larger micro-batches, then fewer other measures."""
    layout = plan.layout
    return (
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.expert_tp,
        -plan.micro_batch_size,
        RECOMPUTES.index(plan.recompute),
        len(plan.recompute_modules),
        TIE_SHARDINGS.index(plan.sharding),
        -(plan.shard_size or plan.layout.dense_shard_size),
        layout.accounts_for_embedding,
        layout.accounts_for_loss,
        layout.num_layers_first_stage or 0,
        layout.num_layers_last_stage or 0,
    )


def _describe_failure(study: Study, num_gpus: int, batch: int, least: _Failure | None) -> str:
    """Why nothing fits at a size: the smallest memory needed, and a remedy for its largest part."""
    if least is None:
        return (
            f"gpus: {study.model.name} must divide over them, got gpus={num_gpus}, global_batch_size={batch}, "
            f"seq_length={study.seq_length}: no layout of the search is whole{describe_restrictions(study.space)}. "
            "Use a power of two or another batch, or widen the restrictions."
        )
    plan, memory = least
    state_bytes = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    limit = study.memory_limit_bytes
    if 2 * state_bytes > memory.total_bytes:
        # Most of the memory is state, which more GPUs share. Suggest the next power of two that would be enough.
        enough = num_gpus * memory.total_bytes / limit
        remedy = f"Use {2 ** math.ceil(math.log2(enough)):,} GPUs or more to share it out, or some with more memory"
    else:
        remedy = "Lower --seq-length, use more GPUs for context parallelism, or some with more memory"
    return (
        f"gpus: one GPU must hold its share of {study.model.name}, got {memory.total_bytes / GIB:.1f} GiB at least of "
        f"{limit / GIB:.1f} with gpus={num_gpus}: {(memory.total_bytes - limit) / GIB:.1f} GiB are missing for "
        f"{describe_plan(plan)}. {remedy}."
    )
