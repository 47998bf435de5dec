"""The search finds the plans of a full search, and gives the reason where nothing fits."""

import math
import re
from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from megatron_hammer.model.accounting import ParallelLayout, StageMemory
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_default_cluster, select_gpu
from megatron_hammer.scaling.plan import Dispatcher, Plan, Precision
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.projection import Projection, Study, describe_plan
from megatron_hammer.scaling.search.search import GIB, Predict, Search, _Fit, _identify_family, _recompute, _tie_key
from megatron_hammer.scaling.search.search_space import (
    Recomputation,
    SearchSpace,
    can_overlap_tensor_parallel,
    list_layouts,
    list_micro_batch_sizes,
    list_recomputations,
)
from megatron_hammer.scaling.search.standing import find_widest_tie_ratio
from tests.helpers.messages import assert_problem
from tests.helpers.toy_study import GPU, build_toy_study, predict


def list_every_plan(study: Study, num_gpus: int) -> Iterator[Plan]:
    """With every sharding, recomputation and overlap, dominated or not."""
    batch = study.global_batch_size_at(num_gpus)
    for layout in list_layouts(
        study.model,
        study.cluster,
        num_gpus=num_gpus,
        global_batch_size=batch,
        seq_length=study.seq_length,
        space=study.space,
    ):
        shares = layout.dense_shard_size > 1
        shardings = ["none", "distributed_optimizer"]
        if layout.pipeline_model_parallel_size == 1 and shares:
            shardings.append("fsdp")
        for micro in list_micro_batch_sizes(layout, batch, study.space):
            for sharding in shardings:
                for recompute in list_recomputations(study.model, study.precision, study.cluster, study.space):
                    for overlap in (False, True):
                        yield Plan(
                            model=study.model,
                            layout=replace(layout, has_distributed_optimizer=sharding != "none"),
                            gpu=study.gpu,
                            cluster=study.cluster,
                            seq_length=study.seq_length,
                            micro_batch_size=micro,
                            global_batch_size=batch,
                            recompute=recompute.granularity,
                            recompute_modules=recompute.modules,
                            sharding=sharding,
                            overlaps_grad_reduce=overlap and shares,
                            overlaps_param_gather=overlap and shares and sharding != "none",
                            overlaps_tensor_parallel=overlap and can_overlap_tensor_parallel(layout, study.cluster),
                        )


def list_every_time_s(study: Study, num_gpus: int, predictor: Predict) -> list[float]:
    """Step times of all plans that fit, each once: dominated twins are the same plan, slower."""
    times: dict[tuple[ParallelLayout, int, str], float] = {}
    for plan in list_every_plan(study, num_gpus):
        if estimate_heaviest_plan_stage(plan).total_bytes > study.memory_limit_bytes:
            continue
        layout = plan.layout
        # Whole samples on each rank are the same work as a part of each sample, without the exchange.
        shared = math.gcd(layout.context_parallel_size, plan.micro_batch_size)
        key = (
            replace(
                layout,
                has_distributed_optimizer=True,
                context_parallel_size=layout.context_parallel_size // shared,
                data_parallel_size=layout.data_parallel_size * shared,
            ),
            plan.micro_batch_size // shared,
            "fsdp" if plan.sharding == "fsdp" else "",
        )
        times[key] = min(times.get(key, float("inf")), predictor(plan).total_s)
    return sorted(times.values())


def assert_nothing_faster_is_missed(study: Study, num_gpus: int, predictor: Predict) -> None:
    """The plans found are the fastest of all, down to the slowest family to be shown and every possible tie."""
    search = Search(predict=predictor)
    fit = _Fit(study, estimate_heaviest_plan_stage)
    candidates = sorted(search._list_candidates(study, num_gpus, study.global_batch_size_at(num_gpus), fit))
    found = search._find_fastest(study, candidates, fit)
    times = list_every_time_s(study, num_gpus, predictor)
    assert [one.step.total_s for one in found] == times[: len(found)]
    assert len({_identify_family(one.plan) for one in found}) >= study.num_best
    if len(found) < len(times):
        assert times[len(found)] > found[0].step.total_s * find_widest_tie_ratio(found[0].step)


@pytest.mark.parametrize("memory_gib", [12, 40])
@pytest.mark.parametrize(("preset", "num_gpus"), [("hammer-1b4", 8), ("tiny-llm-zh-moe", 4)])
def test_the_plans_are_those_of_a_full_search(preset: str, num_gpus: int, memory_gib: int) -> None:
    study = build_toy_study(preset, memory_limit_bytes=memory_gib * GIB, global_batch_size=16, num_best=4)
    study = replace(study, seq_length=min(2048, study.model.max_position_embeddings))
    assert_nothing_faster_is_missed(study, num_gpus, predict)


def test_the_plans_with_the_performance_model_are_those_of_a_full_search() -> None:
    predictor = partial(predict_step, coefficients=build_prior_coefficients())
    study = build_toy_study(
        gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"),
        memory_limit_bytes=11 * GIB,
        global_batch_size=16,
        num_best=4,
    )
    assert_nothing_faster_is_missed(study, 8, predictor)


def test_each_layout_takes_the_fastest_dispatcher_that_is_named() -> None:
    """The same plans as the best of one search for each dispatcher; DeepEP only where tokens travel."""

    def list_found(*names: Dispatcher) -> dict[Hashable, Projection]:
        study = build_toy_study(
            "qwen3-30b-a3b",
            gpu=select_gpu("h100-sxm"),
            cluster=select_cluster("dgx-h100"),
            memory_limit_bytes=70 * GIB,
            global_batch_size=128,
            num_best=500,  # all families, so that none is cut off in one search only
            space=replace(space, dispatchers=names),
        )
        fit = _Fit(study, estimate_heaviest_plan_stage)
        candidates = sorted(search._list_candidates(study, 32, 128, fit))
        found = search._find_fastest(study, candidates, fit)
        return {(*_tie_key(one.plan), one.plan.layout): one for one in found}

    one = (1,)
    space = SearchSpace(
        tensor_model_parallel_sizes=one,
        context_parallel_sizes=one,
        virtual_pipeline_model_parallel_sizes=(1, 2),
        micro_batch_sizes=(1, 4),
    )
    search = Search(predict=partial(predict_step, coefficients=load_coefficients()))
    together, *alone = list_found("alltoall", "deepep"), list_found("alltoall"), list_found("deepep")
    assert len(together) == len(alone[0]) == len(alone[1]) > 50
    for key, one in together.items():
        assert one.step.total_s == min(single[key].step.total_s for single in alone)
    names = {(one.plan.layout.expert_model_parallel_size > 1, one.plan.experts.dispatcher) for one in together.values()}
    assert {(False, "alltoall"), (True, "deepep")} <= names
    assert (False, "deepep") not in names


def test_samples_are_shared_out_before_the_sequence() -> None:
    search = Search(predict=predict)

    def list_pairs(study: Study) -> set[tuple[int, int]]:
        candidates = search._list_candidates(study, 8, 32, _Fit(study, estimate_heaviest_plan_stage))
        return {(one.plan.layout.context_parallel_size, one.micro_batch_size) for one in candidates}

    pairs = list_pairs(build_toy_study())
    assert {size for cp, size in pairs if cp > 1} == {1}
    assert len({size for cp, size in pairs if cp == 1}) > 2
    # Where fewer context ranks are not allowed, larger micro-batches have no twin.
    assert {(2, 1), (2, 2), (2, 4)} <= list_pairs(build_toy_study(space=SearchSpace(context_parallel_sizes=(2,))))


def test_a_family_is_shown_once() -> None:
    study = build_toy_study(num_best=4)
    found = Search(predict=predict).search_plans(study, 8).projections
    assert len({_identify_family(one.plan) for one in found}) == 4
    first, *others = found
    assert [one.step.total_s for one in others] == sorted(one.step.total_s for one in others)
    assert first.standing.is_tied


def test_near_copies_fill_the_rows_that_families_leave_empty() -> None:
    space = SearchSpace(
        tensor_model_parallel_sizes=(1,),
        pipeline_model_parallel_sizes=(1,),
        context_parallel_sizes=(1,),
        shardings=("distributed_optimizer",),
    )
    found = Search(predict=predict).search_plans(build_toy_study(space=space, num_best=3), 8).projections
    assert [one.plan.micro_batch_size for one in found] == [4, 2, 1]
    assert len({_identify_family(one.plan) for one in found}) == 1
    assert sum(one.standing.chance_of_best for one in found) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("preset", "gpu", "precision"),
    [
        ("llama3-70b", "h100-sxm", "bf16"),
        ("llama3-8b", "a100-sxm-80gb", "bf16"),
        ("tiny-llm-zh-moe", "gb200", "fp8"),
        ("gpt2-124m", "v100-sxm3-32gb", "fp16"),
        ("hammer-tiny", "cpu-core", "fp32"),
    ],
)
def test_plans_that_the_search_skips_are_slower(preset: str, gpu: str, precision: Precision) -> None:
    """Of the shipped performance model: no plan beats its bound, and recomputation never makes one faster."""
    chosen = select_preset(preset)
    study = build_toy_study(
        preset,
        gpu=select_gpu(gpu),
        cluster=select_default_cluster(gpu),
        seq_length=chosen.recipe.seq_length,
        precision=precision,
        global_batch_size=1024,
    )
    search = Search(predict=predict_step)
    for num_gpus in (4, 64):
        candidates = list(search._list_candidates(study, num_gpus, 1024, _Fit(study, estimate_heaviest_plan_stage)))
        for candidate in candidates[:: len(candidates) // 40 + 1]:
            plan = replace(candidate.plan, micro_batch_size=candidate.micro_batch_size)
            options = list_recomputations(study.model, study.precision, study.cluster, study.space)
            plans = [_recompute(plan, option) for option in options]
            times = [predict_step(one).total_s for one in plans]
            assert candidate.bound_s <= times[0]
            assert times == sorted(times)
            bytes_needed = [estimate_heaviest_plan_stage(one).total_bytes for one in plans]
            assert bytes_needed == sorted(bytes_needed, reverse=True)


def test_the_bound_prunes() -> None:
    """Most candidates are slower by their bound alone: neither their memory nor their time is computed."""
    tried = set()

    def counted(plan: Plan) -> StageMemory:
        tried.add((plan.layout, plan.micro_batch_size, plan.sharding, plan.shard_size))
        return estimate_heaviest_plan_stage(plan)

    search = Search(predict=predict, estimate=counted)
    size = search.search_plans(build_toy_study(num_best=1, global_batch_size=256), 64)
    assert 4 * len(tried) < size.num_candidates


def test_the_same_study_gives_the_same_result() -> None:
    study = build_toy_study()
    first = Search(predict=predict)
    for num_gpus in (8, 16, 8):  # what another size left behind changes nothing
        assert first.search_plans(study, num_gpus) == Search(predict=predict).search_plans(study, num_gpus)


def test_equal_times_go_to_the_plan_with_fewer_cuts() -> None:
    constant = predict(next(list_every_plan(build_toy_study(), 4)))
    best = Search(predict=lambda _: constant).search_plans(build_toy_study(num_best=1), 8).best
    assert best is not None
    assert best.plan.layout == ParallelLayout(data_parallel_size=8)
    assert (best.plan.micro_batch_size, best.plan.sharding) == (4, "distributed_optimizer")


def test_recomputation_only_where_nothing_less_fits() -> None:
    space = SearchSpace(
        tensor_model_parallel_sizes=(1,), pipeline_model_parallel_sizes=(1,), context_parallel_sizes=(1,)
    )
    study = build_toy_study(space=space, num_best=20, memory_limit_bytes=20 * GIB)
    found = Search(predict=predict).search_plans(study, 8).projections
    options = list_recomputations(study.model, study.precision, study.cluster, study.space)
    chosen = {Recomputation(one.plan.recompute, one.plan.recompute_modules) for one in found}
    assert len(chosen) > 1
    assert chosen < set(options)
    for projection in found:
        own = Recomputation(projection.plan.recompute, projection.plan.recompute_modules)
        for less in options[: options.index(own)]:
            memory = estimate_heaviest_plan_stage(_recompute(projection.plan, less))
            assert memory.total_bytes > study.memory_limit_bytes
        assert projection.memory.total_bytes <= study.memory_limit_bytes


def test_only_one_recomputation_may_be_asked_for() -> None:
    study = build_toy_study(space=SearchSpace(recomputes=("full",)))
    found = Search(predict=predict).search_plans(study, 8).projections
    assert {projection.plan.recompute for projection in found} == {"full"}


def test_overlap_can_be_switched_off() -> None:
    study = build_toy_study(space=SearchSpace(tensor_model_parallel_sizes=(2,)), num_best=1)
    without = replace(study, space=replace(study.space, overlaps_tensor_parallel=False))
    for one, overlaps in ((study, True), (without, False)):
        best = Search(predict=predict).search_plans(one, 8).best
        assert best is not None
        assert best.plan.overlaps_tensor_parallel is overlaps


def test_without_sharding_where_nothing_else_is_allowed() -> None:
    study = build_toy_study(space=SearchSpace(shardings=("none",)))
    best = Search(predict=predict).search_plans(study, 8).best
    assert best is not None
    assert best.plan.sharding == "none"
    assert not best.plan.layout.has_distributed_optimizer
    assert not best.plan.overlaps_param_gather


def test_a_size_on_which_nothing_fits_names_the_memory_needed_and_the_next_size() -> None:
    space = SearchSpace(context_parallel_sizes=(1,))
    study = build_toy_study("llama3-70b", memory_limit_bytes=40 * GIB, space=space, global_batch_size=64)
    size = Search(predict=predict).search_plans(study, 8)
    assert size.best is None
    assert size.least_memory_bytes is not None
    least = size.least_memory_bytes / GIB
    assert_problem(
        size.problem,
        "gpus:",
        "one GPU must hold",
        f"got {least:.1f} GiB at least of 40.0 with gpus=8",
        "tp=8, micro-batch 1, full recomputation, distributed optimizer",
        "Use 32 GPUs",
    )
    smallest = min(estimate_heaviest_plan_stage(plan).total_bytes for plan in list_every_plan(study, 8))
    assert size.least_memory_bytes <= smallest


def test_long_sequences_are_named_where_activations_are_too_much() -> None:
    space = SearchSpace(context_parallel_sizes=(1,), tensor_model_parallel_sizes=(1,))
    model = replace(build_toy_study().model, max_position_embeddings=2**18)
    study = build_toy_study(model=model, seq_length=2**18, space=space, memory_limit_bytes=GPU.memory_bytes)
    problem = Search(predict=predict).search_plans(study, 8).problem
    assert problem is not None
    remedy = "Lower --seq-length, use more GPUs for context parallelism, or some with more memory."
    assert re.search(f"{re.escape(remedy)}$", problem)


def test_a_size_without_a_whole_layout_is_a_problem() -> None:
    size = Search(predict=predict).search_plans(build_toy_study(), 13)
    assert (size.num_candidates, size.projections) == (0, ())
    assert_problem(
        size.problem,
        "gpus:",
        "hammer-1b4 must divide over them",
        "got gpus=13, global_batch_size=32, seq_length=2048",
    )
    # FSDP has no pipeline stages, whatever the number of GPUs.
    space = SearchSpace(pipeline_model_parallel_sizes=(2,), shardings=("fsdp",))
    size = Search(predict=predict).search_plans(build_toy_study(space=space), 8)
    assert_problem(size.problem, "gpus", "no layout", "with --pipeline-model-parallel-size 2 --sharding fsdp", "widen")


def test_plans_in_words() -> None:
    best = Search(predict=predict).search_plans(build_toy_study(num_best=1), 8).best
    assert best is not None
    plan = replace(
        best.plan, recompute="none", micro_batch_size=2, sharding="fsdp", layout=ParallelLayout(data_parallel_size=8)
    )
    assert describe_plan(plan) == "dp=8, micro-batch 2, FSDP"
    cut = ParallelLayout(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=11
    )
    plan = replace(plan, layout=cut, recompute="full", sharding="none")
    assert describe_plan(plan) == "tp=4 pp=2 vp=11, micro-batch 2, full recomputation, no sharding"
    assert describe_plan(replace(plan, layout=ParallelLayout())).startswith("one rank, ")
    assert "3 layers offloaded" in describe_plan(replace(plan, num_offloaded_layers=3))
    away = replace(plan, offload_modules=("core_attn", "mlp_norm"), optimizer_offload_ratio=0.5)
    assert "offloads core_attn mlp_norm, 50% of the optimizer on the host" in describe_plan(away)


def test_a_batch_with_many_divisors_is_searched_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is that of a search that tries every divisor, at less than half of its tries."""
    study = build_toy_study(
        "hammer-tiny",
        gpu_counts=(2,),
        global_batch_size=2 * 3 * 5 * 7 * 11 * 13 * 64,
        seq_length=256,
        memory_limit_bytes=3 * GIB,
        space=SearchSpace(pipeline_model_parallel_sizes=(1,)),
    )
    results, tries = [], []
    for most in (16, 10**9):
        monkeypatch.setattr("megatron_hammer.scaling.search.search.MOST_UNSORTED_SIZES", most)
        count = 0

        def estimate(plan: Plan) -> StageMemory:
            nonlocal count
            count += 1
            return estimate_heaviest_plan_stage(plan)

        results.append(Search(predict=predict, estimate=estimate).search_plans(study, 2).projections)
        tries.append(count)
    assert results[0] == results[1]
    assert results[0]
    assert tries[0] < tries[1] / 2
