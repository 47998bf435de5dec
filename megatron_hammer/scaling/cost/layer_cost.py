"""What one layer costs over one micro-batch: its own time, and the communication that is not hidden.

Communication inside a layer (tensor, context and expert parallelism) is on the critical path of every micro-batch. The
communication of a step (pipeline and data parallelism) is in `step_time.py` and `data_parallel.py`.
"""

from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.communication import (
    estimate_all_reduce_s,
    estimate_all_to_all_s,
    estimate_exposed_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
from megatron_hammer.scaling.cost.compute import LayerTime, PassTime, estimate_layer
from megatron_hammer.scaling.cost.operators import Shard, build_embedding_work, build_head_work, build_layer_work
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan

NO_PASS = PassTime(0.0, 0.0, 0.0, 0.0, 0.0)


class LayerCost(NamedTuple):
    """One layer over one micro-batch: its device time, and the communication that is not hidden."""

    time: LayerTime
    recompute: PassTime
    tensor_forward_s: float
    tensor_backward_s: float  # including what recomputation repeats
    context_forward_s: float
    context_backward_s: float
    expert_forward_s: float
    expert_backward_s: float

    @property
    def forward_s(self) -> float:
        return self.time.forward.device_s + self.tensor_forward_s + self.context_forward_s + self.expert_forward_s

    @property
    def backward_s(self) -> float:
        seconds = self.time.backward.device_s + self.recompute.device_s + self.tensor_backward_s
        return seconds + self.context_backward_s + self.expert_backward_s

    @property
    def host_s(self) -> float:
        return self.time.forward.host_s + self.time.backward.host_s + self.recompute.host_s


def build_shard(plan: Plan) -> Shard:
    """The part of a plan that the work of a layer depends on. num_tokens: of one context-parallel rank."""
    layout = plan.layout
    return Shard(
        tp=layout.tensor_model_parallel_size,
        cp=layout.context_parallel_size,
        ep=layout.expert_model_parallel_size,
        expert_tp=layout.expert_tp,
        has_sequence_parallel=layout.has_sequence_parallel,
        num_tokens=plan.micro_batch_size * plan.seq_length // layout.context_parallel_size,
        seq_length=plan.seq_length,
        precision=plan.precision,
        has_flash_attention=plan.has_flash_attention,
        vocab_divisible_by=plan.vocab_divisible_by,
    )


@lru_cache(maxsize=8192)
def build_layer_cost(
    model: ModelShape,
    shard: Shard,
    gpu: Gpu,
    cluster: Cluster,
    coefficients: Coefficients,
    recompute: str,
    overlaps_tensor_parallel: bool,
) -> LayerCost:
    """The cost of one layer, cached by exactly what it depends on.

    It takes no Plan, so all plans that split a layer in the same way share one result. Full recomputation repeats the
    forward pass with its communication; selective recomputation repeats the core attention only.
    """
    work = build_layer_work(model, shard)
    time = estimate_layer(work, shard, model.head_dim, gpu, coefficients)
    forward = time.forward
    repeated = NO_PASS
    if recompute == "full":
        repeated = forward
    elif recompute == "selective":  # the core attention only, taken as a fifth of the host's work for a layer
        # core_attn alone is the default of recompute_modules in megatron.core (TransformerConfig).
        repeated = PassTime(0.0, forward.attention_s, 0.0, 0.0, forward.host_s * 0.2)
    tensor_forward_s, tensor_backward_s = _estimate_tensor_parallel_s(
        model, shard, cluster, coefficients, overlaps_tensor_parallel
    )
    context_forward_s, context_backward_s = _estimate_context_parallel_s(model, shard, cluster, coefficients, time)
    # The backward pass sends the gradients back over the same ways.
    expert_forward_s = expert_backward_s = _estimate_expert_parallel_s(model, shard, cluster, coefficients)
    if recompute == "full":  # the forward pass is repeated before the backward pass, with its communication
        tensor_backward_s += tensor_forward_s
        context_backward_s += context_forward_s
        expert_backward_s += expert_forward_s
    return LayerCost(
        time=time,
        recompute=repeated,
        tensor_forward_s=tensor_forward_s,
        tensor_backward_s=tensor_backward_s,
        context_forward_s=context_forward_s,
        context_backward_s=context_backward_s,
        expert_forward_s=expert_forward_s,
        expert_backward_s=expert_backward_s,
    )


def _estimate_tensor_parallel_s(
    model: ModelShape, shard: Shard, cluster: Cluster, coefficients: Coefficients, is_overlapped: bool
) -> tuple[float, float]:
    """Two all-reduces of the hidden state per pass, or a reduce-scatter and an all-gather for each of them.

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2. With sequence parallelism the backward pass gathers
    the inputs of the two column-parallel linears once more. That runs beside the product of their gradient and is
    counted as hidden.
    """
    if shard.tp == 1:
        return 0.0, 0.0
    group = place_group(shard.tp, 1, cluster)
    num_bytes = shard.element_bytes * shard.num_tokens * model.hidden_size
    one_s = estimate_all_reduce_s(num_bytes, group, cluster, coefficients)
    if shard.has_sequence_parallel and shard.is_low_precision:
        one_s *= 0.75  # TransformerEngine gathers the inputs of 8-bit products in 8 bits; sums stay in 16
    shown = coefficients.tensor_exposed_ratio if is_overlapped else 1.0
    forward_s = backward_s = 2.0 * one_s * shown
    return forward_s, backward_s


def _estimate_context_parallel_s(
    model: ModelShape, shard: Shard, cluster: Cluster, coefficients: Coefficients, time: LayerTime
) -> tuple[float, float]:
    """Keys and values travel around a ring beside the attention of their chunks; backward, their gradients do too.

    Source: Liu et al. 2023, arXiv 2310.01889; TransformerEngine's AttnFuncWithCPAndKVP2P.
    """
    if shard.cp == 1:
        return 0.0, 0.0
    group = place_group(shard.cp, shard.tp, cluster)
    # Keys and values (2). If there are more tensor-parallel ranks than query groups, each rank has a whole group.
    key_values = 2 * max(model.num_query_groups / shard.tp, 1) * model.head_dim
    num_bytes = shard.element_bytes * shard.num_tokens * key_values
    one_s = (shard.cp - 1) * estimate_send_s(num_bytes, group, cluster, coefficients)
    window = (shard.cp - 1) / shard.cp  # the rank's own chunk is computed without an exchange to hide
    least = coefficients.context_exposed_ratio
    return (
        estimate_exposed_s(one_s, window * time.forward.attention_s, least),
        estimate_exposed_s(2 * one_s, window * time.backward.attention_s, least),
    )


def _estimate_expert_parallel_s(model: ModelShape, shard: Shard, cluster: Cluster, coefficients: Coefficients) -> float:
    """Dispatch and combination of every copy of a token in one pass: two all-to-alls, balanced."""
    if model.moe is None or shard.ep * shard.expert_tp == 1:
        return 0.0
    group = place_group(shard.ep, shard.expert_tp, cluster)
    # Each token is sent to top-k experts; a tensor-parallel rank dispatches its share of the tokens.
    copies = shard.num_tokens / shard.tp * model.moe.router_topk
    num_bytes = shard.element_bytes * copies * model.hidden_size
    seconds = 2.0 * estimate_all_to_all_s(num_bytes, group, cluster, coefficients)
    if shard.expert_tp > 1:
        tensor_group = place_group(shard.expert_tp, 1, cluster)
        seconds += 2.0 * estimate_gather_s(num_bytes * shard.expert_tp, tensor_group, cluster, coefficients)
    return seconds


@lru_cache(maxsize=8192)
def build_end_times(
    model: ModelShape, shard: Shard, gpu: Gpu, coefficients: Coefficients
) -> tuple[LayerTime, LayerTime]:
    embedding = estimate_layer(build_embedding_work(model, shard), shard, model.head_dim, gpu, coefficients)
    head = estimate_layer(build_head_work(model, shard), shard, model.head_dim, gpu, coefficients)
    return embedding, head
