"""Exchanges between the ranks of one sequence: what each sends, what is hidden, and where it is possible."""

import dataclasses

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.cost.communication import (
    estimate_all_to_all_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
from megatron_hammer.scaling.cost.context_parallel import (
    estimate_context_parallel_s,
    find_all_to_all_size,
    list_context_exchanges,
)
from megatron_hammer.scaling.cost.operators import Shard, build_layer_work
from megatron_hammer.scaling.hardware.catalogue import select_cluster

PRIORS = build_prior_coefficients()
CLUSTER = select_cluster("dgx-h100")
MODEL = PRESETS["llama3-8b"].model  # 32 heads and 8 query groups of 128
SHARD = Shard(1, 16, 1, 1, False, 8192, 131072, "bf16", True, 128)
KEY_VALUE_BYTES = 2 * 8192 * 2 * 8 * 128


def estimate(exchange: str, attention_s: tuple[float, float] = (0.0, 0.0), cp: int = 16) -> tuple[float, float]:
    size = find_all_to_all_size(exchange, MODEL, 1, cp, CLUSTER)
    shard = SHARD._replace(cp=cp, context_exchange=exchange, all_to_all_size=size)
    return estimate_context_parallel_s(MODEL, shard, CLUSTER, PRIORS, attention_s)


def test_the_ring_sends_keys_and_values_to_every_other_rank_and_back_with_gradients():
    group = place_group(16, 1, CLUSTER)
    ring_s = 15 * estimate_send_s(KEY_VALUE_BYTES, group, CLUSTER, PRIORS)
    assert estimate("p2p") == pytest.approx((ring_s, 2 * ring_s))
    hidden = estimate("p2p", attention_s=(1e3, 1e3))
    assert hidden == pytest.approx((PRIORS.context_exposed_ratio * ring_s, 2 * PRIORS.context_exposed_ratio * ring_s))


def test_a_gather_is_never_hidden():
    gather_s = estimate_gather_s(16 * KEY_VALUE_BYTES, place_group(16, 1, CLUSTER), CLUSTER, PRIORS)
    assert estimate("all_gather", attention_s=(1e3, 1e3)) == pytest.approx((gather_s, 2 * gather_s))


def test_heads_are_exchanged_before_and_after_attention():
    num_bytes = 2 * 8192 * (2 * 32 + 2 * 8) * 128  # queries and output, keys and values
    expected_s = estimate_all_to_all_s(num_bytes, place_group(8, 1, CLUSTER), CLUSTER, PRIORS) + PRIORS.collective_s
    assert estimate("a2a", attention_s=(1e3, 1e3), cp=8) == pytest.approx((expected_s, expected_s))
    # inside the node by heads, and between two nodes around the ring
    forward_s, backward_s = estimate("a2a+p2p")
    ring_s = estimate_send_s(KEY_VALUE_BYTES, place_group(2, 8, CLUSTER), CLUSTER, PRIORS)
    assert (forward_s, backward_s) == pytest.approx((expected_s + ring_s, expected_s + 2 * ring_s))


@pytest.mark.parametrize(
    ("tp", "cp", "expected"),
    [
        (1, 1, ["p2p"]),
        (1, 8, ["p2p", "all_gather", "a2a"]),  # inside a domain there is nothing to combine
        (1, 16, ["p2p", "all_gather", "a2a+p2p"]),  # 8 query groups do not go over 16 ranks
        (8, 16, ["p2p", "all_gather"]),
        (2, 8, ["p2p", "all_gather", "a2a+p2p"]),
    ],
)
def test_the_exchanges_that_a_model_and_a_placement_allow(tp, cp, expected):
    assert list_context_exchanges(MODEL, tp, cp, CLUSTER) == expected


def test_a_ring_computes_and_merges_attention_chunk_by_chunk():
    ring, gathered = (SHARD._replace(context_exchange=one) for one in ("p2p", "all_gather"))
    assert (ring.num_ring_steps, gathered.num_ring_steps) == (16, 1)
    assert ring.num_queries == gathered.num_queries == 8192
    heads = SHARD._replace(context_exchange="a2a+p2p", all_to_all_size=8)
    assert (heads.num_ring_steps, heads.num_queries) == (2, 65536)
    whole = build_layer_work(MODEL, gathered).forward
    for shard, steps in ((ring, 15), (heads, 1)):
        work = build_layer_work(MODEL, shard).forward
        merged_bytes = 2 * 3 * 0.75 * steps * 8192 * 32 * 128
        assert work.pointwise_bytes - whole.pointwise_bytes == pytest.approx(merged_bytes)
        assert work.num_kernels - whole.num_kernels == 6 * steps
        assert work.attention_flops == whole.attention_flops


def test_a_wider_domain_exchanges_more_heads():
    wide = dataclasses.replace(CLUSTER, nvlink_domain_size=4)
    assert find_all_to_all_size("a2a+p2p", MODEL, 1, 16, wide) == 4
