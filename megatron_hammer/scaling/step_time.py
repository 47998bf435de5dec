"""The time of one training step, part by part: `predict_step` is the door to the performance model.

`operators.py` counts the work of a layer, `compute.py` and `communication.py` turn it into seconds with the
coefficients of `coefficients.py`, `pipeline.py` puts micro-batches and stages together, and here the parts of a step
are added up along its critical path. What a search asks thousands of times is kept by what it depends on.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.accounting import Layout, RankParameters, count_rank_parameters
from megatron_hammer.preset_types import ModelPreset
from megatron_hammer.scaling.coefficients import Coefficients, load_coefficients, select_generation
from megatron_hammer.scaling.communication import (
    Group,
    estimate_all_reduce_s,
    estimate_all_to_all_s,
    estimate_exposed_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
from megatron_hammer.scaling.compute import LayerTime, PassTime, estimate_layer
from megatron_hammer.scaling.operators import (
    Shard,
    build_embedding_work,
    build_head_work,
    build_layer_work,
)
from megatron_hammer.scaling.pipeline import StageKind, build_schedule, list_stages
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan, StepTime

# Bytes that the optimizer moves for one parameter of its shard: the gradient read for the norm, scaled and copied, then
# gradient, master weight and two moments read, the last three written, and the 16-bit weight.
OPTIMIZER_BYTES_PER_PARAMETER = 46
# The host's queue runs ahead of the device: a stage waits for the slower of the two, and a little for both.
HOST_NORM = 4.0
DEFAULT_BUCKET_PARAMETERS = 40_000_000  # megatron.core.distributed: max(40 M, 1 M * data-parallel size)


class LayerCost(NamedTuple):
    """One layer over one micro-batch: its device time, and communication that nothing hides."""

    time: LayerTime
    recompute: PassTime
    tensor_forward_s: float
    tensor_backward_s: float  # with what recomputation repeats
    context_forward_s: float
    context_backward_s: float
    expert_s: float

    @property
    def forward_s(self) -> float:
        return self.time.forward.device_s + self.tensor_forward_s + self.context_forward_s + 0.5 * self.expert_s

    @property
    def backward_s(self) -> float:
        seconds = self.time.backward.device_s + self.recompute.device_s + self.tensor_backward_s
        return seconds + self.context_backward_s + 0.5 * self.expert_s

    @property
    def host_s(self) -> float:
        return self.time.forward.host_s + self.time.backward.host_s + self.recompute.host_s


class StageCost(NamedTuple):
    """One micro-batch on one stage. total_s: what it takes with the host; the forward pass's part of it."""

    device_s: float
    total_s: float
    forward_ratio: float


class DataTraffic(NamedTuple):
    """Seconds of the communication over data ranks, whole, before anything hides it."""

    reduce_s: float
    gather_s: float


NO_PASS = PassTime(0.0, 0.0, 0.0, 0.0, 0.0)


def predict_step(plan: Plan, coefficients: Coefficients | None = None) -> StepTime:
    """Seconds of one step of a plan with their parts and band; ConfigError where layout and model do not fit.

    coefficients: the shipped ones by default. Memory is not looked at (`plan_memory.py`).
    """
    coefficients = coefficients or load_coefficients()
    layout, num_microbatches = plan.layout, plan.num_microbatches
    shard = build_shard(plan)
    layer = _build_layer_cost(
        plan.model, shard, plan.gpu, plan.cluster, coefficients, plan.recompute, plan.overlaps_tensor_parallel
    )
    embedding, head = _build_end_times(plan.model, shard, plan.gpu, coefficients)
    kinds = list_stages(
        plan.model.num_layers,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        layout.num_layers_first_stage,
        layout.num_layers_last_stage,
        layout.accounts_for_embedding,
        layout.accounts_for_loss,
    )
    fsdp_s = _estimate_fsdp_s(plan, layer, coefficients) if plan.sharding == "fsdp" else 0.0
    stages = [_build_stage_cost(kind, layer, embedding, head, fsdp_s) for kind in kinds]
    send_s, fill_send_s = _estimate_pipeline_sends(plan, shard, coefficients)
    counts = [kind.num_stages for kind in kinds]
    schedule = build_schedule(
        [stage.total_s + send_s for stage in stages], counts, layout.virtual_pipeline_model_parallel_size
    )
    kind, stage = kinds[schedule.slowest], stages[schedule.slowest]
    forward_layers, backward_layers = layer.time
    embedding_s = sum(one.device_s for one in embedding) if kind.has_embedding else 0.0
    head_s = sum(one.device_s for one in head) if kind.has_head else 0.0
    layers = num_microbatches * kind.num_layers
    gaps_s = kind.num_layers * (forward_layers.gap_s + backward_layers.gap_s)
    data_s = _estimate_data_parallel_s(plan, stage, kind, coefficients)
    parts = {
        "matmul_s": layers * (forward_layers.matmul_s + backward_layers.matmul_s),
        "attention_s": layers * (forward_layers.attention_s + backward_layers.attention_s),
        "pointwise_s": layers * (forward_layers.pointwise_s + backward_layers.pointwise_s),
        "embedding_and_loss_s": num_microbatches * (embedding_s + head_s),
        "recompute_s": layers * layer.recompute.device_s,
        "overhead_s": num_microbatches * (stage.total_s - stage.device_s + gaps_s) + coefficients.step_s,
        "tensor_parallel_s": num_microbatches * kind.num_layers * (layer.tensor_forward_s + layer.tensor_backward_s),
        "context_parallel_s": num_microbatches * kind.num_layers * (layer.context_forward_s + layer.context_backward_s),
        "expert_parallel_s": num_microbatches * kind.num_layers * layer.expert_s,
        "pipeline_p2p_s": num_microbatches * send_s + fill_send_s,
        "bubble_s": schedule.bubble_s,
        "data_parallel_s": data_s + num_microbatches * kind.num_layers * fsdp_s,
        "optimizer_s": _estimate_optimizer_s(plan, coefficients),
    }
    slowdown = _estimate_slowdown(plan, sum(parts.values()), parts["bubble_s"])
    if slowdown > 1.0:
        parts = {name: seconds * slowdown for name, seconds in parts.items()}
    total_s = sum(parts.values())
    num_nodes = layout.world_size / plan.cluster.gpus_per_node
    jitter_s = total_s * coefficients.jitter_ratio * math.log(max(1.0, num_nodes))
    total_s += jitter_s
    band = math.exp(select_band_ratio(plan, coefficients))
    return StepTime(**parts, jitter_s=jitter_s, low_s=total_s / band, high_s=total_s * band)


def build_shard(plan: Plan) -> Shard:
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


def select_band_class(plan: Plan) -> str:
    """The class of plans whose cross-validated errors are alike: the band's key in the coefficients."""
    if plan.cluster.full_speed_processes_per_node is not None:
        return "cpu"
    if plan.sharding == "fsdp":
        return "fsdp"
    if not plan.has_flash_attention:
        return "unfused_attention"
    kind = "low_precision" if plan.precision in ("fp8", "mxfp8", "nvfp4") else "16_bit"
    return f"{select_generation(plan.gpu)}_{kind}"


def select_band_ratio(plan: Plan, coefficients: Coefficients) -> float:
    return coefficients.band_ratio.get(select_band_class(plan), coefficients.band_ratio["default"])


@lru_cache(maxsize=8192)
def _build_layer_cost(
    model: ModelPreset,
    shard: Shard,
    gpu: Gpu,
    cluster: Cluster,
    coefficients: Coefficients,
    recompute: str,
    overlaps_tensor_parallel: bool,
) -> LayerCost:
    work = build_layer_work(model, shard)
    time = estimate_layer(work, shard, model.head_dim, gpu, coefficients)
    forward = time.forward
    repeated = NO_PASS
    if recompute == "full":
        repeated = forward
    elif recompute == "selective":  # the core attention only
        repeated = PassTime(0.0, forward.attention_s, 0.0, 0.0, forward.host_s * 0.2)
    tensor_forward_s, tensor_backward_s = _estimate_tensor_parallel_s(
        model, shard, cluster, coefficients, overlaps_tensor_parallel
    )
    context_forward_s, context_backward_s = _estimate_context_parallel_s(model, shard, cluster, coefficients, time)
    if recompute == "full":
        tensor_backward_s += tensor_forward_s
        context_backward_s += context_forward_s
    expert_s = _estimate_expert_parallel_s(model, shard, cluster, coefficients)
    if recompute == "full":
        expert_s *= 1.5
    return LayerCost(
        time, repeated, tensor_forward_s, tensor_backward_s, context_forward_s, context_backward_s, expert_s
    )


def _estimate_tensor_parallel_s(
    model: ModelPreset, shard: Shard, cluster: Cluster, coefficients: Coefficients, is_overlapped: bool
) -> tuple[float, float]:
    """Two all-reduces of the hidden state a pass, or a reduce-scatter and an all-gather each (Korthikanti 2022, 4.2).

    With sequence parallelism the backward pass gathers the inputs of the two column-parallel linears once more, beside
    the product that gives their gradient: the part of it that shows is that of any overlapped communication.
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
    model: ModelPreset, shard: Shard, cluster: Cluster, coefficients: Coefficients, time: LayerTime
) -> tuple[float, float]:
    """Keys and values go around a ring beside the attention of their chunks; backward their gradients go too.

    Source: Liu et al. 2023, arXiv 2310.01889; TransformerEngine's AttnFuncWithCPAndKVP2P.
    """
    if shard.cp == 1:
        return 0.0, 0.0
    group = place_group(shard.cp, shard.tp, cluster)
    key_values = 2 * max(model.num_query_groups / shard.tp, 1) * model.head_dim
    num_bytes = shard.element_bytes * shard.num_tokens * key_values
    one_s = (shard.cp - 1) * estimate_send_s(num_bytes, group, cluster, coefficients)
    window = (shard.cp - 1) / shard.cp
    least = coefficients.context_exposed_ratio
    return (
        estimate_exposed_s(one_s, window * time.forward.attention_s, least),
        estimate_exposed_s(2 * one_s, window * time.backward.attention_s, least),
    )


def _estimate_expert_parallel_s(
    model: ModelPreset, shard: Shard, cluster: Cluster, coefficients: Coefficients
) -> float:
    """Dispatch and combine of every copy of a token, forward and backward: four all-to-alls."""
    if model.moe is None or shard.ep * shard.expert_tp == 1:
        return 0.0
    group = place_group(shard.ep, shard.expert_tp, cluster)
    copies = shard.num_tokens / shard.tp * model.moe.router_topk
    num_bytes = shard.element_bytes * copies * model.hidden_size
    seconds = 4.0 * estimate_all_to_all_s(num_bytes, group, cluster, coefficients)
    if shard.expert_tp > 1:
        tensor_group = place_group(shard.expert_tp, 1, cluster)
        seconds += 4.0 * estimate_gather_s(num_bytes * shard.expert_tp, tensor_group, cluster, coefficients)
    return seconds


@lru_cache(maxsize=8192)
def _build_end_times(
    model: ModelPreset, shard: Shard, gpu: Gpu, coefficients: Coefficients
) -> tuple[LayerTime, LayerTime]:
    embedding = estimate_layer(build_embedding_work(model, shard), shard, model.head_dim, gpu, coefficients)
    head = estimate_layer(build_head_work(model, shard), shard, model.head_dim, gpu, coefficients)
    return embedding, head


def _build_stage_cost(
    kind: StageKind, layer: LayerCost, embedding: LayerTime, head: LayerTime, fsdp_s: float
) -> StageCost:
    forward_s, backward_s = kind.num_layers * layer.forward_s, kind.num_layers * layer.backward_s
    host_s = kind.num_layers * layer.host_s
    for end, is_here in ((embedding, kind.has_embedding), (head, kind.has_head)):
        if is_here:
            forward_s += end.forward.device_s
            backward_s += end.backward.device_s
            host_s += end.forward.host_s + end.backward.host_s
    device_s = forward_s + backward_s + kind.num_layers * fsdp_s
    total_s = (device_s**HOST_NORM + host_s**HOST_NORM) ** (1.0 / HOST_NORM)
    return StageCost(device_s, total_s, forward_s / (forward_s + backward_s))


def _estimate_pipeline_sends(plan: Plan, shard: Shard, coefficients: Coefficients) -> tuple[float, float]:
    """(seconds a micro-batch on a stage, seconds of filling and draining) of activations and gradients between stages.

    Plain 1F1B waits for both directions of every micro-batch; interleaved stages send v times as often, but beside the
    work of another chunk (--overlap-p2p-communication, Megatron's default there).
    """
    pp, vp = plan.layout.pipeline_model_parallel_size, plan.layout.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 0.0, 0.0
    group = place_group(pp, plan.layout.world_size // pp, plan.cluster)
    # With sequence parallelism each tensor-parallel rank has its part to send; the older stacks cut the message up as
    # well, and put it together inside the node (scatter/gather, arXiv 2104.04473, section 4.1).
    is_cut = shard.has_sequence_parallel or not shard.has_flash_attention
    num_bytes = shard.element_bytes * shard.num_tokens * plan.model.hidden_size / (shard.tp if is_cut else 1)
    one_s = 2.0 * estimate_send_s(num_bytes, group, plan.cluster, coefficients)
    shown = vp * coefficients.pipeline_exposed_ratio if vp > 1 else 1.0
    return shown * one_s, (pp - 1) * one_s


@lru_cache(maxsize=8192)
def _count_stage_parameters(
    model: ModelPreset, tp: int, ep: int, expert_tp: int, num_layers: int, ends: tuple[bool, bool], multiple: int
) -> RankParameters:
    """Parameters of one rank of a stage with so many layers; the ends are those of a pipeline's first or last stage."""
    layout = Layout(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
        data_parallel_size=ep * expert_tp,
        has_sequence_parallel=True,
    )
    whole = count_rank_parameters(model, layout, 0, vocab_divisible_by=multiple)
    two = count_rank_parameters(replace(model, num_layers=2 * model.num_layers), layout, 0, vocab_divisible_by=multiple)
    layers = model.num_layers
    dense_layer, expert_layer = (two.dense - whole.dense) / layers, (two.expert - whole.expert) / layers
    end = (whole.dense - layers * dense_layer) / (1 if model.has_tied_embeddings else 2)
    num_ends = sum(ends) if not (model.has_tied_embeddings and all(ends)) else 1
    return RankParameters(dense=int(num_layers * dense_layer + num_ends * end), expert=int(num_layers * expert_layer))


def _count_kind_parameters(plan: Plan, kind: StageKind) -> RankParameters:
    layout = plan.layout
    return _count_stage_parameters(
        plan.model,
        layout.tensor_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.expert_tp,
        kind.num_layers,
        (kind.has_embedding, kind.has_head),
        plan.vocab_divisible_by,
    )


def _estimate_traffic(plan: Plan, parameters: RankParameters, coefficients: Coefficients) -> DataTraffic:
    """Reduction of gradients and gathering of parameters, whole: ZeRO-1 as a reduce-scatter and an all-gather.

    Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 7. With fewer shards than copies (shard_size) gradients
    are summed over the copies of a shard as well.
    """
    layout, cluster = plan.layout, plan.cluster
    weight_bytes = 4 if plan.precision == "fp32" else 2
    ranks = layout.data_parallel_size * layout.context_parallel_size
    expert_block = layout.expert_tp * layout.expert_model_parallel_size
    expert_ranks = layout.world_size // layout.pipeline_model_parallel_size // expert_block
    reduce_s = gather_s = 0.0
    for number, size, stride in (
        (parameters.dense, ranks, layout.tensor_model_parallel_size),
        (parameters.expert, expert_ranks, expert_block),
    ):
        if number == 0 or size == 1:
            continue
        gradient_bytes = plan.gradient_bytes * number
        if plan.sharding == "none":
            group = place_group(size, stride, cluster)
            reduce_s += estimate_all_reduce_s(gradient_bytes, group, cluster, coefficients)
            continue
        shards = min(plan.shard_size or size, size)
        group = place_group(shards, stride, cluster)
        reduce_s += estimate_gather_s(gradient_bytes, group, cluster, coefficients)
        gather_s += estimate_gather_s(weight_bytes * number, group, cluster, coefficients)
        copies = place_group(size // shards, stride * shards, cluster)
        reduce_s += estimate_all_reduce_s(gradient_bytes / shards, copies, cluster, coefficients)
    return DataTraffic(reduce_s, gather_s)


def _estimate_data_parallel_s(plan: Plan, stage: StageCost, kind: StageKind, coefficients: Coefficients) -> float:
    """What shows of the reduction beside the last backward pass and of the gathering beside the first forward pass."""
    if plan.sharding == "fsdp":
        return 0.0
    traffic = _estimate_traffic(plan, _count_kind_parameters(plan, kind), coefficients)
    least = coefficients.data_exposed_ratio
    reduce_s, gather_s = traffic
    embedding_s = _estimate_tied_embedding_s(plan, coefficients)
    if plan.overlaps_grad_reduce:
        reduce_s = estimate_exposed_s(reduce_s, stage.total_s * (1 - stage.forward_ratio), least)
    if plan.overlaps_param_gather:
        gather_s = estimate_exposed_s(gather_s, stage.total_s * stage.forward_ratio, least)
    return reduce_s + gather_s + embedding_s


def _estimate_tied_embedding_s(plan: Plan, coefficients: Coefficients) -> float:
    """The first and the last stage sum the gradients of the embedding that both hold, after everything else."""
    pp = plan.layout.pipeline_model_parallel_size
    if pp == 1 or not plan.model.has_tied_embeddings:
        return 0.0
    stride = plan.layout.world_size // pp
    is_inside = plan.layout.world_size <= plan.cluster.nvlink_domain_size
    group = Group(2, 2 if is_inside else 1, stride * pp <= (plan.cluster.leaf_size or stride * pp))
    embedding_size = plan.model.vocab_size * plan.model.hidden_size
    num_bytes = plan.gradient_bytes * embedding_size / plan.layout.tensor_model_parallel_size
    return estimate_all_reduce_s(num_bytes, group, plan.cluster, coefficients)


def _estimate_fsdp_s(plan: Plan, layer: LayerCost, coefficients: Coefficients) -> float:
    """What shows, a layer and micro-batch, of gathering weights for both passes and reducing gradients (ZeRO-3)."""
    one_layer = StageKind(1, False, False, 1)
    traffic = _estimate_traffic(plan, _count_kind_parameters(plan, one_layer), coefficients)
    least = coefficients.fsdp_exposed_ratio
    forward_s = estimate_exposed_s(traffic.gather_s, layer.forward_s, least)
    return forward_s + estimate_exposed_s(traffic.gather_s + traffic.reduce_s, layer.backward_s, least)


def _estimate_optimizer_s(plan: Plan, coefficients: Coefficients) -> float:
    """Adam over the shard of the heaviest stage, bound by memory, and the gradient buffer cleared."""
    layout = plan.layout
    kinds = ((True, layout.pipeline_model_parallel_size == 1), (False, True))
    num_layers = -(-plan.model.num_layers // layout.pipeline_model_parallel_size)
    heaviest = max(
        (_count_kind_parameters(plan, StageKind(num_layers, *ends, 1)) for ends in kinds), key=lambda one: one.total
    )
    shards = 1
    if plan.sharding != "none":
        ranks = layout.data_parallel_size * layout.context_parallel_size
        shards = min(plan.shard_size or ranks, ranks)
    local = heaviest.total / (shards if plan.sharding == "fsdp" else 1)
    num_bytes = OPTIMIZER_BYTES_PER_PARAMETER * heaviest.total / shards + plan.gradient_bytes * local
    own = coefficients.select_gpu(plan.gpu)
    return num_bytes / (own.memory_ratio * plan.gpu.memory_bytes_per_s)


def _estimate_slowdown(plan: Plan, total_s: float, bubble_s: float) -> float:
    """How much longer a step takes where more processes work on a node than it runs at full speed (CPU hosts).

    Processes that wait leave their core to others: a step is the longer of its critical path and of all busy seconds of
    a node over its cores.
    """
    full_speed = plan.cluster.full_speed_processes_per_node
    if full_speed is None:
        return 1.0
    processes = min(plan.layout.world_size, plan.cluster.gpus_per_node)
    return max(1.0, processes / full_speed * (total_s - bubble_s) / total_s)
