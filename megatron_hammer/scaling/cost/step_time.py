"""The time of one training step, part by part: `predict_step` is the entry point of the performance model.

`operators.py` counts the work of a layer. `compute.py` and `communication.py` turn it into seconds with the
coefficients of `coefficients.py`. `pipeline.py` combines micro-batches and stages. This module adds up the parts of a
step along its critical path. A search asks thousands of times, so the parts are cached by what they depend on.
"""

import math
from typing import NamedTuple

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients, select_generation
from megatron_hammer.scaling.cost.communication import estimate_send_s, place_group
from megatron_hammer.scaling.cost.compute import LayerTime
from megatron_hammer.scaling.cost.data_parallel import (
    DataParallelTime,
    build_data_parallel_time,
    estimate_fsdp_s,
    estimate_optimizer_s,
)
from megatron_hammer.scaling.cost.host_offload import add_waits_for_host
from megatron_hammer.scaling.cost.layer_cost import (
    LayerCost,
    average_layer_costs,
    build_end_times,
    build_layer_cost,
    build_shard,
    list_layer_kinds,
)
from megatron_hammer.scaling.cost.operators import Shard
from megatron_hammer.scaling.cost.pipeline import Schedule, StageKind, build_schedule, list_stages
from megatron_hammer.scaling.plan import LOW_PRECISIONS, Plan, StepTime

EXPERT_BAND = "experts"  # of all models with experts, in the table of bands
# The host launches kernels ahead of the device, so a stage takes the longer of the two times, and a little more when
# both are similar.
HOST_NORM = 4.0
# CPU processes that share cores: chosen between a simulation of 1F1B with more processes than cores (tests/numerics)
# and measured times of such processes.
SHARED_CORES_NORM = 4.0
BAND_SCALES = ((64, "64 GPUs and less"), (1023, "65 to 1023 GPUs"))  # the largest of each, then the rest
LARGEST_BAND_SCALE = "1024 GPUs and more"


class StageCost(NamedTuple):
    """One micro-batch on one stage. total_s: both passes with the host's part; forward_s: the forward share of it."""

    device_s: float
    total_s: float
    forward_s: float
    ends_s: float  # of embedding, head and loss


class StepCosts(NamedTuple):
    """What a step is added up from. `timeline/trace.py` draws the same numbers as a timeline.

    layer: the mean one of the slowest stage. layer_costs: of each kind of layer. kinds and stages belong together,
    position by position. fsdp_s: of one layer over one micro-batch. send_s: what a stage waits for its neighbours, per
    micro-batch. fill_send_s: once per step.
    """

    layer: LayerCost
    layer_costs: tuple[LayerCost, ...]
    embedding: LayerTime
    head: LayerTime
    kinds: tuple[StageKind, ...]
    stages: tuple[StageCost, ...]
    fsdp_s: float
    send_s: float
    fill_send_s: float
    schedule: Schedule
    data_parallel: DataParallelTime
    optimizer_s: float
    step_s: float


def predict_step(plan: Plan, coefficients: Coefficients | None = None) -> StepTime:
    """Seconds of one step of a plan, with their parts and band.

    coefficients: the shipped ones by default. Raises ConfigError if the layout does not fit the model. Memory is not
    checked here: see `plan_memory.py`.
    """
    coefficients = coefficients or load_coefficients()
    parts, idle_s = _estimate_parts(plan, coefficients)
    slowdown = _estimate_slowdown(plan, sum(parts.values()), idle_s)
    if slowdown > 1.0:
        parts = {name: seconds * slowdown for name, seconds in parts.items()}
    total_s = sum(parts.values())
    num_nodes = plan.layout.world_size / plan.cluster.gpus_per_node
    # The logarithm is 0 for a run inside one node, which therefore has no jitter.
    jitter_s = total_s * coefficients.jitter_ratio * math.log(max(1.0, num_nodes))
    total_s += jitter_s
    band = math.exp(select_band_ratio(plan, coefficients))
    return StepTime(**parts, jitter_s=jitter_s, low_s=total_s / band, high_s=total_s * band)


def build_step_costs(plan: Plan, coefficients: Coefficients) -> StepCosts:
    """The costs of a plan's layers, stages and communication, before they are added up along the critical path."""
    layout = plan.layout
    shard = build_shard(plan)
    models, layer_kinds = list_layer_kinds(plan.model)
    costs = tuple(_build_plan_layer(plan, model, shard, coefficients) for model in models)
    embedding, head = build_end_times(plan.model, shard, plan.gpu, coefficients)
    kinds = _list_plan_stages(plan, layer_kinds)
    layers = [average_layer_costs(costs, kind.kind_counts) for kind in kinds]
    fsdp_s = 0.0
    if plan.sharding == "fsdp":
        fsdp_s = estimate_fsdp_s(plan, layers[0].forward_s, layers[0].backward_s, coefficients)
    stages = tuple(
        _build_stage_cost(kind, layer, embedding, head, fsdp_s) for kind, layer in zip(kinds, layers, strict=True)
    )
    send_s, fill_send_s = _estimate_pipeline_sends(plan, shard, coefficients)
    schedule = build_schedule(
        [stage.total_s + send_s for stage in stages],
        [kind.num_stages for kind in kinds],
        layout.virtual_pipeline_model_parallel_size,
    )
    kind, stage = kinds[schedule.slowest], stages[schedule.slowest]
    return StepCosts(
        layer=layers[schedule.slowest],
        layer_costs=costs,
        embedding=embedding,
        head=head,
        kinds=kinds,
        stages=stages,
        fsdp_s=fsdp_s,
        send_s=send_s,
        fill_send_s=fill_send_s,
        schedule=schedule,
        data_parallel=build_data_parallel_time(
            plan, kind, stage.forward_s, stage.total_s - stage.forward_s, coefficients
        ),
        optimizer_s=estimate_optimizer_s(plan, coefficients),
        step_s=coefficients.step_s,
    )


def _estimate_parts(plan: Plan, coefficients: Coefficients) -> tuple[dict[str, float], float]:
    """Every part of StepTime except the jitter, and the seconds that a process waits for others, on average."""
    costs, num_microbatches = build_step_costs(plan, coefficients), plan.num_microbatches
    layer, schedule = costs.layer, costs.schedule
    # Parts are those of the slowest stage. What the other stages add is in the bubble.
    kind, stage = costs.kinds[schedule.slowest], costs.stages[schedule.slowest]
    layers = num_microbatches * kind.num_layers
    forward, backward = layer.time
    waited_s = num_microbatches * (stage.total_s - stage.device_s)  # for the host
    parts = {
        "matmul_s": layers * (forward.matmul_s + backward.matmul_s),
        "attention_s": layers * (forward.attention_s + backward.attention_s),
        "pointwise_s": layers * (forward.pointwise_s + backward.pointwise_s),
        "embedding_and_loss_s": num_microbatches * stage.ends_s,
        "recompute_s": layers * layer.recompute.device_s,
        "overhead_s": layers * (forward.gap_s + backward.gap_s) + waited_s + costs.step_s,
        "tensor_parallel_s": layers * (layer.tensor_forward_s + layer.tensor_backward_s),
        "context_parallel_s": layers * (layer.context_forward_s + layer.context_backward_s),
        "expert_parallel_s": layers * (layer.expert_forward_s + layer.expert_backward_s),
        "pipeline_p2p_s": num_microbatches * costs.send_s + costs.fill_send_s,
        "bubble_s": schedule.bubble_s,
        "data_parallel_s": costs.data_parallel.exposed_s + layers * costs.fsdp_s,
        "optimizer_s": costs.optimizer_s,
    }
    return parts, schedule.bubble_s + num_microbatches * schedule.imbalance_s


def _build_plan_layer(plan: Plan, model: ModelShape, shard: Shard, coefficients: Coefficients) -> LayerCost:
    """The cost of a layer of one kind; where only some layers are recomputed, every layer has its share of that."""
    run = (model, shard, plan.gpu, plan.cluster, coefficients)
    rest = (plan.overlaps_tensor_parallel, plan.recompute_modules)
    layer = add_waits_for_host(build_layer_cost(*run, plan.recompute, *rest), plan, model)
    if plan.recompute != "full" or plan.recompute_num_layers is None:
        return layer
    layout = plan.layout
    num_chunks = layout.pipeline_model_parallel_size * layout.virtual_pipeline_model_parallel_size
    num_repeated = min(plan.model.num_layers, plan.recompute_num_layers * num_chunks)
    counts = (num_repeated, plan.model.num_layers - num_repeated)
    return average_layer_costs((layer, build_layer_cost(*run, "none", *rest)), counts)


def _list_plan_stages(plan: Plan, layer_kinds: tuple[int, ...]) -> tuple[StageKind, ...]:
    layout = plan.layout
    return list_stages(
        plan.model.num_layers,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        layout.num_layers_first_stage,
        layout.num_layers_last_stage,
        layout.accounts_for_embedding,
        layout.accounts_for_loss,
        layout.chunk_layers,
        layer_kinds,
        plan.model.num_mtp_layers,
    )


def select_band_class(plan: Plan) -> str:
    """The class of plans with similar cross-validated errors: the key of the band in the coefficients file."""
    if plan.cluster.full_speed_processes_per_node is not None:
        return "cpu"
    if plan.sharding == "fsdp" and plan.model.moe is None:
        return "fsdp"
    if not plan.has_flash_attention:
        return "unfused_attention"
    if plan.model.moe is not None:
        return f"{select_generation(plan.gpu)}_experts"
    kind = "low_precision" if plan.precision in LOW_PRECISIONS else "16_bit"
    return f"{select_generation(plan.gpu)}_{kind}"


def select_band_scale(plan: Plan) -> str:
    """The number of GPUs as one of BAND_SCALES: runs of many GPUs err for other reasons than runs of few."""
    num_gpus = plan.layout.world_size
    return next((name for largest, name in BAND_SCALES if num_gpus <= largest), LARGEST_BAND_SCALE)


def name_band(band_class: str, scale: str) -> str:
    """The key of the band of a class at a scale."""
    return f"{band_class}, {scale}"


def split_band(name: str) -> str:
    """The class of a key of name_band."""
    return name.partition(", ")[0]


def select_band_ratio(plan: Plan, coefficients: Coefficients) -> float:
    """That of the plan's class and scale, else of its class, else of all runs with experts or of all dense ones."""
    bands, band_class = coefficients.band_ratio, select_band_class(plan)
    names = (
        name_band(band_class, select_band_scale(plan)),
        band_class,
        *((EXPERT_BAND,) if plan.model.moe is not None else ()),
        "default",
    )
    return next(bands[name] for name in names if name in bands)


def _build_stage_cost(
    kind: StageKind, layer: LayerCost, embedding: LayerTime, head: LayerTime, fsdp_s: float
) -> StageCost:
    forward_s, backward_s = kind.num_layers * layer.forward_s, kind.num_layers * layer.backward_s
    host_s, ends_s = kind.num_layers * layer.host_s, 0.0
    for end, is_here in ((embedding, kind.has_embedding), (head, kind.has_head)):
        if is_here:
            forward_s += end.forward.device_s
            backward_s += end.backward.device_s
            host_s += end.forward.host_s + end.backward.host_s
            ends_s += end.forward.device_s + end.backward.device_s
    device_s = forward_s + backward_s + kind.num_layers * fsdp_s
    total_s = (device_s**HOST_NORM + host_s**HOST_NORM) ** (1.0 / HOST_NORM)
    return StageCost(device_s, total_s, total_s * forward_s / (forward_s + backward_s), ends_s)


def _estimate_pipeline_sends(plan: Plan, shard: Shard, coefficients: Coefficients) -> tuple[float, float]:
    """Sending activations and gradients between stages: (seconds per micro-batch, seconds of filling and draining).

    Plain 1F1B waits for both directions of every micro-batch. Interleaved stages send v times as often, but while
    another chunk is computed (--overlap-p2p-communication, Megatron's default for them).
    """
    pp, vp = plan.layout.pipeline_model_parallel_size, plan.layout.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 0.0, 0.0
    group = place_group(pp, plan.layout.world_size // pp, plan.cluster)
    # With sequence parallelism each tensor-parallel rank sends its own part. Software without flash attention splits
    # the message too, and gathers it inside the node (scatter/gather, arXiv 2104.04473, section 4.1).
    is_cut = shard.has_sequence_parallel or not shard.has_flash_attention
    num_bytes = shard.element_bytes * shard.num_tokens * plan.model.hidden_size / (shard.tp if is_cut else 1)
    one_s = 2.0 * estimate_send_s(num_bytes, group, plan.cluster, coefficients)
    shown = vp * coefficients.pipeline_exposed_ratio if vp > 1 else 1.0
    return shown * one_s, (pp - 1) * one_s


def _estimate_slowdown(plan: Plan, total_s: float, idle_s: float) -> float:
    """How much longer a step takes if a node has more processes than it can run at full speed (CPU hosts).

    A process that waits (idle_s, the mean of all) leaves its core to others. A step takes the longer of two times: its
    critical path, and all busy seconds of a node divided by its cores. It takes a little more if the two are similar.
    """
    full_speed = plan.cluster.full_speed_processes_per_node
    if full_speed is None:
        return 1.0
    processes = min(plan.layout.world_size, plan.cluster.gpus_per_node)
    if processes <= full_speed:
        return 1.0
    floor_ratio = processes / full_speed * (total_s - idle_s) / total_s
    return (1.0 + floor_ratio**SHARED_CORES_NORM) ** (1.0 / SHARED_CORES_NORM)
