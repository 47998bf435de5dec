"""One layer over one micro-batch, with the communication inside it."""

import dataclasses

import pytest

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, replace_values
from megatron_hammer.scaling.cost.layer_cost import (
    average_layer_costs,
    build_end_times,
    build_layer_cost,
    build_shard,
    list_layer_kinds,
)
from megatron_hammer.scaling.cost.operators import Shard
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import ExpertOptions, Plan

PRIORS = build_prior_coefficients()
MODEL = PRESETS["llama3-70b"].model
GPU, CLUSTER = select_gpu("h100-sxm"), select_cluster("dgx-h100")
SHARD = Shard(4, 1, 1, 4, True, 8192, 8192, "bf16", True, 128)


def cost(shard: Shard = SHARD, recompute: str = "none", coefficients=PRIORS, model=MODEL):
    return build_layer_cost(model, shard, GPU, CLUSTER, coefficients, recompute, False)


def test_a_shard_is_what_a_plan_does_to_a_layer():
    layout = ParallelLayout(
        tensor_model_parallel_size=4, context_parallel_size=2, data_parallel_size=1, has_sequence_parallel=True
    )
    plan = Plan(
        model=MODEL,
        layout=layout,
        gpu=GPU,
        cluster=CLUSTER,
        seq_length=8192,
        micro_batch_size=3,
        global_batch_size=12,
    )
    assert build_shard(plan) == Shard(4, 2, 1, 4, True, 3 * 4096, 8192, "bf16", True, 128)


def test_tensor_ranks_sum_the_hidden_state_twice_a_pass():
    num_bytes = 2 * 8192 * MODEL.hidden_size
    ring_s = 2 * num_bytes * 3 / 4 / (PRIORS.nvlink_ratio * CLUSTER.nvlink_bytes_per_s)
    latency_s = 2 * (PRIORS.collective_s + PRIORS.hop_ratio * 3 * CLUSTER.nvlink_latency_s)
    assert cost().tensor_forward_s == pytest.approx(2 * (ring_s + latency_s))
    assert cost().tensor_backward_s == cost().tensor_forward_s
    assert cost(SHARD._replace(tp=1)).tensor_forward_s == 0


def test_inputs_are_gathered_in_eight_bits_where_they_are_multiplied_in_eight():
    wide, narrow = cost(), cost(SHARD._replace(precision="fp8"))
    assert narrow.tensor_forward_s == pytest.approx(0.75 * wide.tensor_forward_s)


def test_full_recomputation_repeats_communication_too():
    assert cost(recompute="full").tensor_backward_s == pytest.approx(2 * cost().tensor_backward_s)
    assert cost(recompute="full").recompute == cost().time.forward


def test_keys_and_values_travel_beside_attention():
    shard = SHARD._replace(cp=4, num_tokens=2048)
    ring, alone = cost(shard), cost()
    assert 0 < ring.context_forward_s < ring.context_backward_s <= 2 * ring.context_forward_s
    all_shown = cost(shard, coefficients=replace_values(PRIORS, {"context_exposed_ratio": 1.0}))
    num_bytes = 2 * 2048 * 2 * MODEL.num_query_groups // 4 * MODEL.head_dim
    sent_s = num_bytes / (PRIORS.nvlink_ratio * CLUSTER.nvlink_bytes_per_s)
    network_s = num_bytes / (PRIORS.network_ratio * CLUSTER.network_bytes_per_s)  # tp * cp = 16 crosses nodes
    assert 3 * sent_s < all_shown.context_forward_s
    assert all_shown.context_forward_s == pytest.approx(
        3 * (network_s + CLUSTER.network_latency_s + PRIORS.collective_s)
    )
    assert alone.context_forward_s == 0


def test_experts_are_sent_to_and_fetched_from():
    model = dataclasses.replace(
        MODEL, moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=MODEL.ffn_hidden_size // 4)
    )
    shard = SHARD._replace(tp=1, expert_tp=1, ep=8)
    once = cost(shard, model=model).expert_forward_s
    more = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router_topk=4))
    assert once > 0
    assert 1.9 * once < cost(shard, model=more).expert_forward_s < 2 * once
    assert cost(shard, model=model).expert_backward_s == once
    assert cost().expert_forward_s == 0


def test_full_recomputation_sends_the_experts_tokens_forward_again() -> None:
    """Before its own two all-to-alls, the backward pass repeats the two of the forward pass: 1 to 2."""
    model = dataclasses.replace(MODEL, moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=1792))
    full = cost(SHARD._replace(tp=1, expert_tp=1, ep=8), "full", model=model)
    assert full.expert_forward_s > 0
    assert full.expert_backward_s == pytest.approx(2 * full.expert_forward_s)
    assert full.forward_s == pytest.approx(full.time.forward.device_s + full.expert_forward_s)
    recomputed_s = full.time.backward.device_s + full.recompute.device_s
    assert full.backward_s == pytest.approx(recomputed_s + full.expert_backward_s)


def test_the_head_costs_its_vocabulary():
    embedding, head = build_end_times(MODEL, SHARD, GPU, PRIORS)
    small, small_head = build_end_times(dataclasses.replace(MODEL, vocab_size=32000), SHARD, GPU, PRIORS)
    assert small == embedding
    ratio = small_head.forward.matmul_s / head.forward.matmul_s
    assert ratio == pytest.approx(32256 / 128512, rel=0.02)  # padded to multiples of 128 * tp


def test_a_layer_of_a_mixed_stage_is_the_mean_of_its_kinds():
    moe = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=3584, dense_layers=(0, 1))
    model = dataclasses.replace(MODEL, moe=moe)
    kinds, numbers = list_layer_kinds(model)
    assert [kind.moe is None for kind in kinds] == [True, False]
    assert numbers[:4] == (0, 0, 1, 1)
    assert list_layer_kinds(MODEL) == ((MODEL,), ())
    dense, mixture = (cost(model=kind) for kind in kinds)
    mean = average_layer_costs((dense, mixture), (1, 3))
    assert mean.forward_s == pytest.approx((dense.forward_s + 3 * mixture.forward_s) / 4)
    assert average_layer_costs((dense,), ()) is dense


def test_an_overlapped_exchange_is_hidden_except_for_its_share():
    moe = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=3584)
    model = dataclasses.replace(MODEL, moe=moe)
    shard = SHARD._replace(ep=4, expert_tp=1)
    shown = cost(shard, model=model)
    hidden = cost(shard._replace(experts=ExpertOptions(overlaps_communication=True)), model=model)
    assert hidden.expert_forward_s == pytest.approx(PRIORS.experts.exposed_ratio * shown.expert_forward_s)
    assert hidden.time == shown.time


def test_recomputing_a_mixture_repeats_its_exchange():
    moe = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=3584)
    model = dataclasses.replace(MODEL, moe=moe)
    shard = SHARD._replace(ep=4, expert_tp=1)
    plain = cost(shard, model=model)
    again = build_layer_cost(model, shard, GPU, CLUSTER, PRIORS, "selective", False, ("moe",))
    assert again.expert_backward_s == pytest.approx(2 * plain.expert_backward_s)
    assert again.recompute.matmul_s > 0


def test_sinks_slow_attention_down():
    plain, sinks = cost(), cost(model=dataclasses.replace(MODEL, has_attention_sinks=True))
    ratio = PRIORS.experts.sink_attention_ratio
    assert sinks.time.forward.attention_s == pytest.approx(plain.time.forward.attention_s / ratio)
