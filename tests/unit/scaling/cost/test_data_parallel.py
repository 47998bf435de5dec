"""Gradients, parameters and the optimizer over data ranks."""

import dataclasses

import pytest

from megatron_hammer.model.accounting import ParallelLayout, count_rank_parameters
from megatron_hammer.model.shape import MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, replace_values
from megatron_hammer.scaling.cost.data_parallel import (
    OPTIMIZER_BYTES_PER_PARAMETER,
    build_data_parallel_time,
    estimate_fsdp_s,
    estimate_optimizer_s,
)
from megatron_hammer.scaling.cost.pipeline import StageKind
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import Plan

COEFFICIENTS = replace_values(
    build_prior_coefficients(), {"collective_s": 1e-12, "network_ratio": 1.0, "nvlink_ratio": 1.0}
)
CLUSTER = dataclasses.replace(select_cluster("dgx-h100"), network_latency_s=0.0, nvlink_latency_s=0.0, leaf_size=0)
MODEL = PRESETS["llama3-8b"].model
PLAN = Plan(
    model=MODEL,
    layout=ParallelLayout(tensor_model_parallel_size=8, data_parallel_size=4, has_sequence_parallel=True),
    gpu=select_gpu("h100-sxm"),
    cluster=CLUSTER,
    seq_length=8192,
    micro_batch_size=1,
    global_batch_size=4,
    overlaps_grad_reduce=False,
    overlaps_param_gather=False,
)
WHOLE = StageKind(MODEL.num_layers, True, True, 1)


def estimate(plan: Plan, kind: StageKind = WHOLE, forward_s: float = 0.0, backward_s: float = 0.0) -> float:
    return build_data_parallel_time(plan, kind, forward_s, backward_s, COEFFICIENTS).exposed_s


def test_a_distributed_optimizer_scatters_gradients_and_gathers_weights():
    parameters = count_rank_parameters(MODEL, PLAN.layout, 0).total
    expected = (4 + 2) * parameters * 3 / 4 / CLUSTER.network_bytes_per_s  # one rank of the group on each node
    assert estimate(PLAN) == pytest.approx(expected, rel=1e-6)


def test_without_it_gradients_are_summed_and_nothing_is_gathered():
    parameters = count_rank_parameters(MODEL, PLAN.layout, 0).total
    expected = 2 * 4 * parameters * 3 / 4 / CLUSTER.network_bytes_per_s
    assert estimate(dataclasses.replace(PLAN, sharding="none")) == pytest.approx(expected, rel=1e-6)


def test_parameters_of_a_stage_are_those_of_its_layers_and_ends():
    piped = dataclasses.replace(PLAN.layout, pipeline_model_parallel_size=4)
    plan = dataclasses.replace(PLAN, layout=piped)
    whole = estimate(PLAN)
    kinds = (StageKind(8, True, False, 1), StageKind(8, False, False, 2), StageKind(8, False, True, 1))
    shares = [estimate(plan, kind) * kind.num_stages for kind in kinds]
    assert sum(shares) == pytest.approx(whole, rel=1e-4)
    assert shares[0] > shares[1] / 2


def test_shards_inside_a_node_leave_only_sums_to_the_network():
    layout = ParallelLayout(data_parallel_size=32)
    every = dataclasses.replace(PLAN, layout=layout)
    inside = dataclasses.replace(every, shard_size=8)
    parameters = count_rank_parameters(MODEL, layout, 0).total
    scatter_s = (4 + 2) * parameters * 7 / 8 / CLUSTER.nvlink_bytes_per_s
    sum_s = 2 * 4 * parameters / 8 * 3 / 4 / CLUSTER.network_bytes_per_s
    assert estimate(inside) == pytest.approx(scatter_s + sum_s, rel=1e-6)


def test_overlapped_communication_costs_only_its_exposed_share():
    plan = dataclasses.replace(PLAN, overlaps_grad_reduce=True, overlaps_param_gather=True)
    least = COEFFICIENTS.data_exposed_ratio * estimate(PLAN)
    assert estimate(plan, forward_s=10.0, backward_s=10.0) == pytest.approx(least)
    assert estimate(plan, forward_s=1e-3, backward_s=0.0) == pytest.approx(estimate(PLAN) - 1e-3)


def test_full_sharding_gathers_a_layer_twice_and_scatters_once():
    plan = dataclasses.replace(PLAN, sharding="fsdp", layout=ParallelLayout(data_parallel_size=32))
    layer = count_rank_parameters(MODEL, plan.layout, 0).total
    ends = count_rank_parameters(dataclasses.replace(MODEL, num_layers=1), plan.layout, 0).total
    layer = (layer - ends) / (MODEL.num_layers - 1)
    bandwidth = 8 * CLUSTER.network_bytes_per_s
    assert estimate_fsdp_s(plan, 0.0, 0.0, COEFFICIENTS) == pytest.approx(
        (2 + 2 + 4) * layer * 31 / 32 / bandwidth, rel=1e-4
    )
    assert estimate(plan) == 0


def test_the_optimizer_works_on_its_shard_and_clears_every_gradient():
    parameters = count_rank_parameters(MODEL, PLAN.layout, 0).total
    bytes_per_s = COEFFICIENTS.gpus["hopper"].memory_ratio * PLAN.gpu.memory_bytes_per_s
    expected = (OPTIMIZER_BYTES_PER_PARAMETER / 4 + 4) * parameters / bytes_per_s
    assert estimate_optimizer_s(PLAN, COEFFICIENTS) == pytest.approx(expected, rel=1e-4)
    alone = estimate_optimizer_s(dataclasses.replace(PLAN, sharding="none"), COEFFICIENTS)
    assert alone == pytest.approx((OPTIMIZER_BYTES_PER_PARAMETER + 4) * parameters / bytes_per_s, rel=1e-4)


def test_experts_have_groups_of_their_own():
    model = PRESETS["tiny-llm-zh-moe"].model
    layout = ParallelLayout(data_parallel_size=8, expert_model_parallel_size=8)
    plan = dataclasses.replace(PLAN, model=model, layout=layout)
    kind = StageKind(model.num_layers, True, True, 1)
    rank = count_rank_parameters(model, layout, 0)
    # eight experts on eight ranks: each has its own, so nothing of them is summed
    expected = (4 + 2) * rank.dense * 7 / 8 / CLUSTER.nvlink_bytes_per_s
    assert estimate(plan, kind) == pytest.approx(expected, rel=1e-4)


def test_the_optimizer_shards_experts_over_the_ranks_that_hold_them() -> None:
    """Eight ranks hold the same dense parameters. With ep=4, only two of them hold the same two of eight experts."""
    model = PRESETS["tiny-llm-zh-moe"].model
    layout = ParallelLayout(data_parallel_size=8, expert_model_parallel_size=4)
    plan = dataclasses.replace(PLAN, model=model, layout=layout)
    rank = count_rank_parameters(model, layout, 0)
    own = rank.dense / 8 + rank.expert / 2
    bytes_per_s = COEFFICIENTS.gpus["hopper"].memory_ratio * PLAN.gpu.memory_bytes_per_s
    expected = (OPTIMIZER_BYTES_PER_PARAMETER * own + 4 * rank.total) / bytes_per_s
    assert estimate_optimizer_s(plan, COEFFICIENTS) == pytest.approx(expected, rel=1e-4)
    fully_sharded = dataclasses.replace(plan, sharding="fsdp")
    expected = (OPTIMIZER_BYTES_PER_PARAMETER + 4) * own / bytes_per_s
    assert estimate_optimizer_s(fully_sharded, COEFFICIENTS) == pytest.approx(expected, rel=1e-4)


def test_a_tied_embedding_is_summed_with_its_padding() -> None:
    """Between the first and the last stage. 50,257 rows of GPT-2 are padded to a multiple of 128 x tp."""
    model = PRESETS["gpt2-124m"].model
    layout = ParallelLayout(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, has_sequence_parallel=True)
    plan = dataclasses.replace(PLAN, model=model, layout=layout)
    assert (model.vocab_size, model.hidden_size) == (50_257, 768)
    summed_bytes = 4 * 50_688 // 4 * 768  # 99 x 512 rows in four parts, gradients of 4 bytes
    # With one data-parallel rank nothing else is communicated; an all-reduce over 2 ranks moves each byte once.
    assert estimate(plan, StageKind(6, True, False, 1)) == pytest.approx(summed_bytes / CLUSTER.nvlink_bytes_per_s)


def test_what_is_hidden_and_what_shows_is_all_the_traffic():
    plan = dataclasses.replace(PLAN, overlaps_grad_reduce=True, overlaps_param_gather=True)
    alone = build_data_parallel_time(plan, WHOLE, 0.0, 0.0, COEFFICIENTS)
    beside = build_data_parallel_time(plan, WHOLE, 1e9, 1e9, COEFFICIENTS)
    assert (alone.hidden_reduce_s, alone.hidden_gather_s) == (0.0, 0.0)
    assert beside.exposed_reduce_s == pytest.approx(COEFFICIENTS.data_exposed_ratio * alone.exposed_reduce_s)
    assert beside.exposed_reduce_s + beside.hidden_reduce_s == pytest.approx(alone.exposed_reduce_s)
    assert beside.exposed_gather_s + beside.hidden_gather_s == pytest.approx(alone.exposed_gather_s)


def test_parameters_of_a_stage_are_those_of_the_kinds_of_its_layers():
    """Three dense layers and two mixtures on the first of two stages; a layer for a further token on the last."""
    moe = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=512, dense_layers=(0, 1, 2))
    model = dataclasses.replace(MODEL, num_layers=10, moe=moe, num_mtp_layers=1)
    layout = ParallelLayout(pipeline_model_parallel_size=2, data_parallel_size=8, expert_model_parallel_size=4)
    plan = dataclasses.replace(PLAN, model=model, layout=layout, global_batch_size=8)
    for pp_rank, kind in enumerate((StageKind(5, True, False, 1, (3, 2)), StageKind(6, False, True, 1, (0, 6)))):
        exact = count_rank_parameters(model, layout, pp_rank)
        traffic = dataclasses.replace(plan, layout=layout)
        dense, expert = 7 / 8 * exact.dense, 1 / 2 * exact.expert
        expected = (4 + 2) * (dense + expert) / CLUSTER.nvlink_bytes_per_s
        assert estimate(traffic, kind) == pytest.approx(expected, rel=1e-6)
    # Where FSDP gathers layer by layer, a layer is the average of all.
    fsdp = dataclasses.replace(plan, sharding="fsdp", overlaps_grad_reduce=True)
    uniform = dataclasses.replace(model, moe=dataclasses.replace(moe, dense_layers=()))
    assert (
        0
        < estimate_fsdp_s(fsdp, 0.0, 0.0, COEFFICIENTS)
        != estimate_fsdp_s(dataclasses.replace(fsdp, model=uniform), 0.0, 0.0, COEFFICIENTS)
    )
