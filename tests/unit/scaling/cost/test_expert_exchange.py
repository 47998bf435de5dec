"""The way of tokens to their experts: distinct places by counting all choices, and what dispatchers save."""

from dataclasses import replace
from itertools import combinations

import pytest

from megatron_hammer.model.shape import MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, replace_values
from megatron_hammer.scaling.cost.expert_exchange import count_distinct_places, estimate_exchange_s
from megatron_hammer.scaling.cost.operators import Shard
from megatron_hammer.scaling.hardware.catalogue import select_cluster
from megatron_hammer.scaling.plan import Dispatcher, ExpertOptions

PRIORS = build_prior_coefficients()
MOE = MoeShape(num_experts=64, router_topk=8, ffn_hidden_size=1536)
MODEL = replace(PRESETS["llama2-7b"].model, moe=MOE)
SHARD = Shard(1, 1, 8, 1, False, 4096, 4096, "bf16", True, 128)
H100, GB200 = select_cluster("dgx-h100"), select_cluster("gb200-nvl72")


def exchange_s(
    shard: Shard, dispatcher: Dispatcher = "alltoall", cluster=H100, coefficients=PRIORS, model=MODEL
) -> float:
    shard = shard._replace(experts=replace(shard.experts, dispatcher=dispatcher))
    return estimate_exchange_s(model, shard, cluster, coefficients)


@pytest.mark.parametrize(("experts", "topk", "places"), [(8, 2, 4), (12, 3, 3), (6, 6, 2), (9, 1, 3)])
def test_distinct_places_by_counting_every_choice(experts: int, topk: int, places: int) -> None:
    moe = MoeShape(num_experts=experts, router_topk=topk, ffn_hidden_size=1)
    choices = list(combinations(range(experts), topk))
    counted = sum(len({expert * places // experts for expert in choice}) for choice in choices) / len(choices)
    assert count_distinct_places(moe, places) == pytest.approx(counted)


def test_group_limited_routing_visits_few_nodes() -> None:
    """DeepSeek-V3: 8 of 256 experts, of at most 4 nodes of 8."""
    free = MoeShape(num_experts=256, router_topk=8, ffn_hidden_size=1)
    assert count_distinct_places(free, 8) == pytest.approx(5.3, abs=0.05)
    assert count_distinct_places(replace(free, num_groups=8, group_topk=4), 8) == 4


def test_one_rank_exchanges_nothing() -> None:
    assert exchange_s(SHARD._replace(ep=1)) == 0.0


def test_a_token_crosses_the_network_once_to_each_node() -> None:
    """Over four nodes the all-to-all sends 8 copies, and DeepEP one to each node with an expert of the token."""
    exact = replace_values(
        PRIORS, {"collective_s": 1e-12, "experts.all_to_all_ratio": 1.0, "experts.fused_dispatch_ratio": 1.0}
    )
    shard = SHARD._replace(ep=32)
    latency_free = replace(H100, nvlink_latency_s=0.0, network_latency_s=0.0)
    plain = exchange_s(shard, "alltoall", latency_free, exact)
    fused = exchange_s(shard, "deepep", latency_free, exact)
    assert plain / fused == pytest.approx(MOE.router_topk / count_distinct_places(MOE, 4), rel=1e-3)


def test_in_one_domain_a_token_goes_once_to_each_rank() -> None:
    many = SHARD._replace(ep=64, num_tokens=65_536)
    assert (
        exchange_s(many, "hybridep", GB200) < exchange_s(many, "alltoall", GB200) < exchange_s(many, "alltoall", H100)
    )


def test_imbalance_and_expert_tensor_parallelism_cost_time() -> None:
    assert exchange_s(SHARD._replace(experts=ExpertOptions(imbalance_ratio=2.0))) > 1.5 * exchange_s(SHARD)
    assert exchange_s(SHARD._replace(ep=4, expert_tp=2)) > exchange_s(SHARD)


def test_all_gather_sends_every_token_to_every_rank() -> None:
    wide = SHARD._replace(num_tokens=65_536)
    few = replace(MODEL, moe=replace(MOE, router_topk=1))
    assert exchange_s(wide, "allgather", model=few) > 2 * exchange_s(wide, "alltoall", model=few)
