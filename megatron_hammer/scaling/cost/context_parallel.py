"""Context parallelism: what the ranks of one sequence exchange around attention, by Megatron's --cp-comm-type.

p2p: keys and values travel around a ring beside attention (Liu et al. 2023, arXiv 2310.01889). all_gather: they are
gathered before it (Llama 3, arXiv 2407.21783, section 3.3.2). a2a: each rank gets some heads of the whole sequence
(DeepSpeed Ulysses, arXiv 2309.14509). a2a+p2p: a2a inside an NVLink domain and the ring between domains. Source of what
overlaps: TransformerEngine's context_parallel.py.
"""

from megatron_hammer.model.layout import divisors
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.communication import (
    estimate_all_to_all_s,
    estimate_exposed_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
from megatron_hammer.scaling.cost.operators import Shard
from megatron_hammer.scaling.plan import CONTEXT_EXCHANGES, Cluster, ContextExchange


def list_context_exchanges(model: ModelShape, tp: int, cp: int, cluster: Cluster) -> list[ContextExchange]:
    """Those that this model and placement allow, p2p first; p2p alone without context parallelism."""
    if cp == 1:
        return ["p2p"]
    return [one for one in CONTEXT_EXCHANGES if find_all_to_all_size(one, model, tp, cp, cluster) is not None]


def find_all_to_all_size(
    exchange: ContextExchange, model: ModelShape, tp: int, cp: int, cluster: Cluster
) -> int | None:
    """Ranks that exchange heads: 1 without, all of them with a2a, those of a domain with a2a+p2p. None: not possible.

    Every rank needs a whole number of query groups. a2a+p2p is for groups beyond a domain, and its inner group is the
    largest one inside.
    """
    if exchange in ("p2p", "all_gather") or cp == 1:
        return 1
    sizes = [cp] if exchange == "a2a" else [size for size in divisors(cp) if 1 < size < cp]
    if exchange == "a2a+p2p":
        is_beyond = tp * cp > cluster.nvlink_domain_size
        sizes = [size for size in sizes if is_beyond and tp * size <= cluster.nvlink_domain_size]
    # TransformerEngine's AttnFuncWithCPAndQKVOA2A: heads of queries and of keys must be divisible by the group.
    whole = [size for size in sizes if model.num_query_groups % (tp * size) == 0]
    return max(whole, default=None)


def estimate_context_parallel_s(
    model: ModelShape,
    shard: Shard,
    cluster: Cluster,
    coefficients: Coefficients,
    attention_s: tuple[float, float],
) -> tuple[float, float]:
    """(forward, backward) seconds of the exchange that nothing hides, of one layer and micro-batch.

    attention_s: of both passes.
    """
    if shard.cp == 1:
        return 0.0, 0.0
    # If there are more tensor-parallel ranks than query groups, each rank has a whole group.
    key_values = max(model.num_query_groups / shard.tp, 1) * (model.head_dim + model.value_dim)
    key_value_bytes = shard.element_bytes * shard.num_tokens * key_values
    if shard.context_exchange == "all_gather":
        group = place_group(shard.cp, shard.tp, cluster)
        gather_s = estimate_gather_s(shard.cp * key_value_bytes, group, cluster, coefficients)
        return gather_s, 2 * gather_s  # gathered again for the backward pass, whose gradients are scattered
    inner = shard.all_to_all_size
    heads_s = 0.0
    if inner > 1:  # queries, keys and values before attention, its output after it; backward their gradients
        queries = model.num_attention_heads / shard.tp * (model.head_dim + model.value_dim)
        num_bytes = shard.element_bytes * shard.num_tokens * (queries + key_values)
        heads_s = estimate_all_to_all_s(num_bytes, place_group(inner, shard.tp, cluster), cluster, coefficients)
        heads_s += coefficients.collective_s  # of the second one: before and after attention
    num_steps = shard.cp // inner - 1
    ring = place_group(shard.cp // inner, shard.tp * inner, cluster)
    one_s = num_steps * estimate_send_s(key_value_bytes, ring, cluster, coefficients)
    window = num_steps / (num_steps + 1)  # the rank's own chunk is computed without an exchange to hide
    least = coefficients.context_exposed_ratio
    return (
        heads_s + estimate_exposed_s(one_s, window * attention_s[0], least),
        heads_s + estimate_exposed_s(2 * one_s, window * attention_s[1], least),
    )
