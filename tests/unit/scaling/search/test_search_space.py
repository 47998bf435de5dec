"""The layouts of the search are those that preflight accepts, except the ones that the module documents as left out."""

import itertools
from dataclasses import replace

import pytest

from megatron_hammer.config.preflight.batch import find_schedule_problems, find_size_problems
from megatron_hammer.config.preflight.layout import find_layout_problems
from megatron_hammer.config.run_plan import Batch
from megatron_hammer.model.accounting import ParallelLayout, find_split_problems
from megatron_hammer.model.layout import divisors
from megatron_hammer.model.shape import LatentAttention, ModelShape
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import Cluster, ExpertOptions, Plan, Precision, RecomputeModule
from megatron_hammer.scaling.search.search_space import (
    SearchSpace,
    can_overlap_experts,
    can_overlap_tensor_parallel,
    list_dispatchers,
    list_layouts,
    list_micro_batch_sizes,
    list_recomputations,
    list_shard_sizes,
    list_shardings,
)
from tests.helpers.toy_study import CLUSTER

CPU_HOST = replace(CLUSTER, full_speed_processes_per_node=2)
ANYTHING = SearchSpace()


def list_all(
    model: ModelShape, num_gpus: int, batch: int, seq_length: int, space: SearchSpace = ANYTHING
) -> list[ParallelLayout]:
    return list(
        list_layouts(model, CLUSTER, num_gpus=num_gpus, global_batch_size=batch, seq_length=seq_length, space=space)
    )


def find_problems(
    model: ModelShape, layout: ParallelLayout, *, num_gpus: int, micro: int, batch: int, seq_length: int
) -> list[str]:
    """What preflight says of the layout's flags."""
    sizes = Batch(
        micro_batch_size=micro,
        global_batch_size=batch,
        eval_micro_batch_size=micro,
        eval_global_batch_size=batch,
        has_own_evaluation=False,
        is_scheduled=False,
        may_decrease=False,
        microbatch_group_size=None,
    )
    problems = find_layout_problems(model, layout, world_size=num_gpus, seq_length=seq_length)
    if problems or layout.virtual_pipeline_model_parallel_size == 1:
        return problems + find_size_problems(sizes, layout)
    return find_size_problems(sizes, layout) or find_schedule_problems(sizes, layout, is_evaluated=False)


def list_by_brute_force(
    model: ModelShape, num_gpus: int, batch: int, seq_length: int
) -> set[tuple[ParallelLayout, int]]:
    """Every even or flag-balanced layout and micro-batch that preflight accepts and the search does not rule out."""
    accepted = set()
    sizes = divisors(num_gpus)
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    for tp, cp, pp, ep in itertools.product(sizes, sizes, sizes, experts):
        if num_gpus % (tp * cp * pp) or (cp > 1 and seq_length % (2 * tp * cp)):
            continue
        for etp, vp, ends in itertools.product(
            sorted({1, tp}) if model.moe else [None],
            range(1, model.num_layers + 2),
            ((False, False), (False, True), (True, True)),
        ):
            if (pp == 1 and ends != (False, False)) or (pp == 2 and ends == (True, True)):
                continue
            layout = ParallelLayout(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vp,
                context_parallel_size=cp,
                data_parallel_size=num_gpus // (tp * cp * pp),
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                has_sequence_parallel=tp > 1,
                accounts_for_embedding=ends[0],
                accounts_for_loss=ends[1],
            )
            for micro in divisors(batch):
                arguments = {"num_gpus": num_gpus, "micro": micro, "batch": batch, "seq_length": seq_length}
                if not find_problems(model, layout, **arguments):
                    accepted.add((layout, micro))
    return accepted


@pytest.mark.parametrize(
    ("preset", "num_gpus", "batch", "seq_length"),
    [
        ("hammer-tiny", 8, 16, 256),
        ("hammer-tiny-moe", 8, 8, 256),
        ("hammer-1b4", 4, 8, 2048),  # 22 layers go over 4 stages as 24 places
        ("gpt2-124m", 6, 12, 96),  # no power of two
    ],
)
def test_the_search_has_what_preflight_accepts(preset: str, num_gpus: int, batch: int, seq_length: int) -> None:
    model = select_preset(preset).model
    listed = [
        (layout, micro)
        for layout in list_all(model, num_gpus, batch, seq_length)
        if layout.num_layers_first_stage is None
        for micro in list_micro_batch_sizes(layout, batch, ANYTHING)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == list_by_brute_force(model, num_gpus, batch, seq_length)


def test_layers_that_no_even_split_shares_out_get_uneven_ends() -> None:
    model = replace(select_preset("hammer-1b4").model, num_layers=31)  # 31, 32 and 33 over 5 stages leave a rest
    space = SearchSpace(pipeline_model_parallel_sizes=(5,), tensor_model_parallel_sizes=(1,))
    layouts = list_all(model, 5, 10, 2048, space)
    assert {(layout.num_layers_first_stage, layout.num_layers_last_stage) for layout in layouts} == {(5, 5)}
    for layout in layouts:
        assert find_split_problems(31, layout) == ()
        assert find_problems(model, layout, num_gpus=5, micro=1, batch=10, seq_length=2048) == []


def test_layers_that_cannot_be_shared_out_have_no_layout() -> None:
    model = replace(select_preset("hammer-1b4").model, num_layers=9)
    space = SearchSpace(pipeline_model_parallel_sizes=(7,))
    assert list_all(model, 7, 7, 2048, space) == []  # 5 middle stages of 2 would leave the ends with nothing


def test_restrictions_leave_only_what_they_name() -> None:
    model = select_preset("hammer-tiny-moe").model
    space = SearchSpace(
        tensor_model_parallel_sizes=(2,),
        pipeline_model_parallel_sizes=(1, 2),
        virtual_pipeline_model_parallel_sizes=(2,),
        context_parallel_sizes=(1,),
        expert_model_parallel_sizes=(2,),
        expert_tensor_parallel_sizes=(1,),
        micro_batch_sizes=(2,),
    )
    layouts = list_all(model, 8, 16, 256, space)
    assert [
        (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.expert_model_parallel_size,
            layout.expert_tensor_parallel_size,
            layout.data_parallel_size,
        )
        for layout in layouts
    ] == [(2, 2, 2, 1, 2, 1, 2)]
    assert list_micro_batch_sizes(layouts[0], 16, space) == [2]


def test_interleaved_stages_take_micro_batches_in_groups_of_the_stages() -> None:
    layout = ParallelLayout(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, data_parallel_size=2
    )
    assert list_micro_batch_sizes(layout, 24, ANYTHING) == [1, 3]  # 12 and 4 micro-batches; not 6, 3, 2, 1
    plain = replace(layout, virtual_pipeline_model_parallel_size=1)
    assert list_micro_batch_sizes(plain, 24, ANYTHING) == [1, 2, 3, 4, 6, 12]


def test_shardings() -> None:
    pipelined = ParallelLayout(pipeline_model_parallel_size=2, data_parallel_size=4)
    flat = ParallelLayout(data_parallel_size=8)
    alone = ParallelLayout(tensor_model_parallel_size=8, has_sequence_parallel=True)
    assert list_shardings(flat, CLUSTER, ANYTHING) == ["distributed_optimizer", "fsdp"]
    assert list_shardings(pipelined, CLUSTER, ANYTHING) == ["distributed_optimizer"]
    assert list_shardings(alone, CLUSTER, ANYTHING) == ["distributed_optimizer"]
    assert list_shardings(flat, CPU_HOST, ANYTHING) == ["distributed_optimizer"]
    assert list_shardings(flat, CLUSTER, SearchSpace(shardings=("none",))) == ["none"]
    assert list_shardings(pipelined, CLUSTER, SearchSpace(shardings=("fsdp",))) == []


def test_what_is_sharded_may_be_shared_within_a_domain_or_a_leaf() -> None:
    cluster = replace(CLUSTER, nvlink_domain_size=8, leaf_size=64)
    flat = ParallelLayout(data_parallel_size=256)
    assert list_shard_sizes(flat, "fsdp", cluster) == [None, 8, 64]
    halved = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=128, has_sequence_parallel=True)
    assert list_shard_sizes(halved, "distributed_optimizer", cluster) == [None, 4, 32]
    assert list_shard_sizes(ParallelLayout(data_parallel_size=8), "fsdp", cluster) == [None]  # all are in one domain
    assert list_shard_sizes(flat, "none", cluster) == [None]
    assert list_shard_sizes(flat, "distributed_optimizer", CPU_HOST) == [None]
    # the ranks of an expert are split into as many copies: 256 / 8 = 32 of them, but only 16 ranks hold one
    experts = replace(flat, expert_model_parallel_size=16)
    assert list_shard_sizes(experts, "distributed_optimizer", cluster) == [None, 64]


def test_a_cpu_host_has_no_context_parallelism() -> None:
    model = select_preset("hammer-tiny").model
    on_gpus = list_all(model, 4, 8, 256)
    on_cpus = list(list_layouts(model, CPU_HOST, num_gpus=4, global_batch_size=8, seq_length=256, space=ANYTHING))
    assert {layout.context_parallel_size for layout in on_cpus} == {1}
    assert on_cpus == [layout for layout in on_gpus if layout.context_parallel_size == 1]


def test_overlap_of_tensor_parallelism_stays_inside_an_nvlink_domain() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=8, has_sequence_parallel=True)
    assert can_overlap_tensor_parallel(layout, CLUSTER)
    assert not can_overlap_tensor_parallel(layout, CPU_HOST)
    assert not can_overlap_tensor_parallel(layout, replace(CLUSTER, nvlink_domain_size=4))
    assert not can_overlap_tensor_parallel(ParallelLayout(data_parallel_size=8), CLUSTER)


def test_a_dispatcher_with_kernels_of_its_own_needs_another_rank() -> None:
    whole = ParallelLayout(data_parallel_size=8)
    assert list_dispatchers(whole, ("deepep", "hybridep")) == ("alltoall",)
    assert list_dispatchers(whole, ("allgather", "deepep")) == ("allgather",)
    cut = replace(whole, expert_model_parallel_size=2)
    assert list_dispatchers(cut, ("allgather", "deepep")) == ("allgather", "deepep")
    assert list_dispatchers(replace(whole, tensor_model_parallel_size=2), ("deepep",)) == ("deepep",)


def test_the_exchange_with_experts_overlaps_where_two_micro_batches_can_pass_at_once() -> None:
    model = select_preset("qwen3-30b-a3b").model
    layout = ParallelLayout(data_parallel_size=8, expert_model_parallel_size=8)
    plan = Plan(
        model=model, layout=layout, gpu=select_gpu("h100-sxm"), cluster=select_cluster("dgx-h100"), seq_length=4096,
        micro_batch_size=1, global_batch_size=64,
    )  # fmt: skip
    pipeline = replace(layout, pipeline_model_parallel_size=2, data_parallel_size=8)
    assert can_overlap_experts(plan)
    assert can_overlap_experts(replace(plan, layout=replace(pipeline, virtual_pipeline_model_parallel_size=2)))
    for change in (
        {"layout": pipeline},
        {"layout": replace(layout, expert_model_parallel_size=1)},
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ("moe",)},
        {"experts": ExpertOptions(dispatcher="allgather")},
        {"sharding": "fsdp"},
        {"precision": "fp32"},
    ):
        assert not can_overlap_experts(replace(plan, **change))


def list_selections(
    model: ModelShape, precision: Precision = "bf16", cluster: Cluster = CLUSTER
) -> list[tuple[RecomputeModule, ...]]:
    first, *selective, last = list_recomputations(model, precision, cluster, SearchSpace())
    assert (first.granularity, last.granularity) == ("none", "full")
    assert {option.granularity for option in selective} == {"selective"}
    return [option.modules for option in selective]


def test_what_is_offloaded_is_not_recomputed_as_a_whole() -> None:
    moe = select_preset("tiny-llm-zh-moe").model
    inside, outside = (SearchSpace(offload_modules=(module,)) for module in ("moe_act", "core_attn"))
    options = list_recomputations(moe, "bf16", CLUSTER, inside)
    assert [(one.granularity, "moe" in one.modules) for one in options] == [("none", False), ("selective", False)]
    assert [one.modules for one in list_recomputations(moe, "bf16", CLUSTER, outside)][-1] == ("layernorm", "moe")
    assert list_recomputations(moe, "fp8", CLUSTER, replace(inside, recomputes=("full",))) == []


def test_selective_recomputation_repeats_what_is_cheap_first() -> None:
    dense, moe = select_preset("hammer-1b4").model, select_preset("tiny-llm-zh-moe").model
    assert list_selections(dense) == [("layernorm",), ("layernorm", "mlp")]
    assert moe.moe is not None
    assert moe.moe.shared_expert_intermediate_size
    assert list_selections(moe) == [("layernorm", "moe_act", "shared_experts"), ("layernorm", "moe")]
    # Delayed scaling, the recipe of fp8, goes with neither norms nor activation functions.
    assert list_selections(dense, "fp8") == [("mlp",)]
    assert list_selections(moe, "fp8") == [("shared_experts",), ("moe",)]
    plain = replace(moe, moe=replace(moe.moe, shared_expert_intermediate_size=0))
    assert list_selections(plain, "fp8") == [("moe",)]
    latent = LatentAttention(q_lora_rank=8, kv_lora_rank=6, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=4)
    mixed = replace(moe, latent_attention=latent, moe=replace(moe.moe, dense_layers=(0,)))
    assert list_selections(mixed, "mxfp8") == [
        ("layernorm", "mla_up_proj", "mlp", "moe_act", "shared_experts"),
        ("layernorm", "mla_up_proj", "mlp", "moe"),
    ]
    # On a CPU host attention is not fused, and keeps its scores.
    assert list_selections(moe, cluster=CPU_HOST) == [("core_attn",)]
    only = SearchSpace(recomputes=("full",))
    assert [option.granularity for option in list_recomputations(dense, "bf16", CLUSTER, only)] == ["full"]


def test_dozens_of_chunks_are_searched_only_where_they_are_asked_for() -> None:
    model = replace(select_preset("hammer-1b4").model, num_layers=48)

    def list_chunks(space: SearchSpace) -> set[int]:
        layouts = list_all(model, 2, 8, 2048, replace(space, pipeline_model_parallel_sizes=(2,)))
        return {layout.virtual_pipeline_model_parallel_size for layout in layouts}

    assert max(list_chunks(ANYTHING)) == 12
    assert list_chunks(replace(ANYTHING, virtual_pipeline_model_parallel_sizes=(24,))) == {24}
