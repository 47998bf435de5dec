"""Seconds in which tokens travel to their experts and back, by dispatcher.

NCCL's all-to-all sends every copy of a token. DeepEP and HybridEP send a token once to each node or NVLink domain that
has one of its experts, and copy it there over NVLink (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""

import math

from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.communication import (
    Group,
    build_link,
    estimate_all_to_all_s,
    estimate_farthest_s,
    estimate_gather_s,
    place_group,
)
from megatron_hammer.scaling.cost.operators import Shard
from megatron_hammer.scaling.plan import Cluster


def estimate_exchange_s(model: ModelShape, shard: Shard, cluster: Cluster, coefficients: Coefficients) -> float:
    """One way: the dispatch of a micro-batch's tokens to their experts, or the combination of the results."""
    moe, dispatcher = model.moe, shard.experts.dispatcher
    assert moe is not None
    if shard.ep * shard.expert_tp == 1:
        return 0.0
    # A tensor-parallel rank dispatches its share of the tokens.
    token_bytes = shard.experts.imbalance_ratio * shard.element_bytes * shard.num_tokens / shard.tp * model.hidden_size
    group = place_group(shard.ep, shard.expert_tp, cluster)
    own = coefficients.experts
    tensor_group = place_group(shard.expert_tp, 1, cluster)
    if dispatcher == "allgather":
        whole = place_group(shard.ep * shard.expert_tp, 1, cluster)
        return estimate_gather_s(token_bytes * whole.size, whole, cluster, coefficients)
    if dispatcher == "alltoall":
        seconds = estimate_all_to_all_s(token_bytes * moe.router_topk, group, cluster, coefficients)
        seconds /= own.all_to_all_ratio
    else:
        seconds = _estimate_fused_s(moe, token_bytes, group, cluster, coefficients) / own.fused_dispatch_ratio
    copies_bytes = token_bytes * moe.router_topk * shard.expert_tp
    return seconds + estimate_gather_s(copies_bytes, tensor_group, cluster, coefficients)


def _estimate_fused_s(
    moe: MoeShape, token_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients
) -> float:
    if group.size == 1:
        return 0.0
    link = build_link(group, cluster, coefficients)
    num_domains = group.num_domains
    ranks = count_distinct_places(moe, group.size) * (group.size - 1) / group.size
    domains = count_distinct_places(moe, num_domains) * (num_domains - 1) / num_domains
    local_s = token_bytes * ranks / link.local_bytes_per_s
    remote_s = token_bytes * domains / (link.remote_bytes_per_s / group.local_size)
    # Copies are forwarded while others arrive.
    return max(local_s, remote_s) + estimate_farthest_s(group, cluster, coefficients)


def count_distinct_places(moe: MoeShape, num_places: float) -> float:
    """How many of `num_places` equal parts of the experts a token is sent to, on average.

    Its top-k experts are different ones, and all choices are equally likely. With group-limited routing they are in
    group_topk of num_groups parts at most.
    """
    experts, topk = moe.num_experts, moe.router_topk
    others = experts - experts / num_places
    missed = 1.0  # that a part has none of the k experts
    for index in range(topk):
        missed *= max(0.0, others - index) / (experts - index)
    places = num_places * (1.0 - missed)
    if moe.num_groups and moe.group_topk:
        places = min(places, moe.group_topk * max(1.0, math.ceil(num_places / moe.num_groups)))
    return places
