"""What one layer costs over one micro-batch: its own time, and the communication that is not hidden.

Communication inside a layer (tensor, context and expert parallelism) is on the critical path of every micro-batch. The
communication of a step (pipeline and data parallelism) is in `step_time.py` and `data_parallel.py`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.communication import (
    estimate_all_reduce_s,
    estimate_exposed_s,
    estimate_gather_s,
    place_group,
)
from megatron_hammer.scaling.cost.compute import (
    LayerTime,
    PassTime,
    add_pass_times,
    build_rates,
    estimate_layer,
    estimate_work,
)
from megatron_hammer.scaling.cost.context_parallel import estimate_context_parallel_s, find_all_to_all_size
from megatron_hammer.scaling.cost.expert_cost import MixtureCost, build_mixture_cost
from megatron_hammer.scaling.cost.operators import Shard, build_embedding_work, build_head_work, build_layer_work
from megatron_hammer.scaling.cost.recompute import build_recomputed_work
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan, RecomputeModule

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


@lru_cache(maxsize=256)
def list_layer_kinds(model: ModelShape) -> tuple[tuple[ModelShape, ...], tuple[int, ...]]:
    """(the model with each kind of its layers only, the kind of every layer); no numbers if all layers are alike."""
    if model.is_uniform:
        return (model,), ()
    kinds: dict[ModelShape, int] = {}
    numbers = tuple(kinds.setdefault(model.select_kind(layer), len(kinds)) for layer in range(model.num_layers))
    return tuple(kinds), numbers


def average_layer_costs(costs: tuple[LayerCost, ...], counts: tuple[int, ...]) -> LayerCost:
    """The mean of a stage's layers, `counts` of each kind; the only kind of a model whose layers are alike."""
    if len(costs) == 1 or not sum(counts):
        return costs[0]
    mean: LayerCost = _average(costs, counts)
    return mean


def _average(values: Any, counts: tuple[int, ...]) -> Any:
    if not isinstance(values[0], tuple):
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    return type(values[0])(*(_average(parts, counts) for parts in zip(*values, strict=True)))


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
        experts=plan.experts,
        cuda_graphs=plan.cuda_graphs,
        software_year=plan.software_year,
        context_exchange=plan.context_exchange,
        all_to_all_size=find_all_to_all_size(
            plan.context_exchange,
            plan.model,
            layout.tensor_model_parallel_size,
            layout.context_parallel_size,
            plan.cluster,
        )
        or 1,
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
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",),
) -> LayerCost:
    """The cost of one layer, cached by exactly what it depends on.

    It takes no Plan, so all plans that split a layer in the same way share one result. Full recomputation repeats the
    forward pass with its communication; selective recomputation repeats recompute_modules.
    """
    work = build_layer_work(model, shard)
    time = estimate_layer(work, shard, model.head_dim, gpu, coefficients)
    if model.has_attention_sinks:
        time = _slow_attention(time, coefficients.experts.sink_attention_ratio)
    mixture = None if model.moe is None else build_mixture_cost(model, shard, gpu, cluster, coefficients)
    repeated = NO_PASS
    if recompute == "selective":
        repeated = _estimate_selective(model, shard, gpu, coefficients, recompute_modules, time.forward, mixture)
    elif recompute == "full":
        repeated = time.forward if mixture is None else add_pass_times(time.forward, mixture.forward)
    tensor_forward_s, tensor_backward_s = _estimate_tensor_parallel_s(
        model, shard, cluster, coefficients, overlaps_tensor_parallel
    )
    context_forward_s, context_backward_s = estimate_context_parallel_s(
        model, shard, cluster, coefficients, (time.forward.attention_s, time.backward.attention_s)
    )
    expert_forward_s = expert_backward_s = 0.0
    if mixture is not None:
        expert_forward_s, expert_backward_s = _expose_exchange(mixture, time, shard, coefficients)
        if recompute == "selective" and "moe" in recompute_modules:
            expert_backward_s += expert_forward_s
        time = LayerTime(add_pass_times(time.forward, mixture.forward), add_pass_times(time.backward, mixture.backward))
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
    if shard.has_sequence_parallel:
        one_s = 2.0 * estimate_gather_s(num_bytes, group, cluster, coefficients)
    else:
        one_s = estimate_all_reduce_s(num_bytes, group, cluster, coefficients)
    if shard.has_sequence_parallel and shard.is_low_precision:
        one_s *= 0.75  # TransformerEngine gathers the inputs of 8-bit products in 8 bits; sums stay in 16
    shown = coefficients.tensor_exposed_ratio if is_overlapped else 1.0
    forward_s = backward_s = 2.0 * one_s * shown
    return forward_s, backward_s


def estimate_hidden_tensor_s(layer: LayerCost, is_overlapped: bool, coefficients: Coefficients) -> tuple[float, float]:
    """Tensor-parallel communication of a layer that runs beside its products, forward and backward."""
    hidden = 1.0 / coefficients.tensor_exposed_ratio - 1.0 if is_overlapped else 0.0
    return hidden * layer.tensor_forward_s, hidden * layer.tensor_backward_s


def _slow_attention(time: LayerTime, ratio: float) -> LayerTime:
    return LayerTime(*(one._replace(attention_s=one.attention_s / ratio) for one in time))


def _estimate_selective(
    model: ModelShape,
    shard: Shard,
    gpu: Gpu,
    coefficients: Coefficients,
    modules: tuple[RecomputeModule, ...],
    forward: PassTime,
    mixture: MixtureCost | None,
) -> PassTime:
    """What selective recomputation repeats of one layer. forward: without its mixture."""
    work = build_recomputed_work(model, shard, tuple(module for module in modules if module != "core_attn"))
    repeated = estimate_work(
        work, build_rates(gpu, shard.precision, coefficients, shard.software_year), coefficients, 1.0
    )
    if "core_attn" in modules:  # taken as a fifth of the host's work for a layer
        repeated = add_pass_times(repeated, PassTime(0.0, forward.attention_s, 0.0, 0.0, forward.host_s * 0.2))
    if "moe" in modules and mixture is not None:
        repeated = add_pass_times(repeated, mixture.forward)
    return repeated


def _expose_exchange(
    mixture: MixtureCost, time: LayerTime, shard: Shard, coefficients: Coefficients
) -> tuple[float, float]:
    """Dispatch and combination that are not hidden, forward and backward. The backward pass sends as many bytes.

    With --overlap-moe-expert-parallel-comm, the exchange of one micro-batch runs beside the layer's work for another.
    time: of the layer without its mixture.
    """
    if not shard.experts.overlaps_communication:
        return mixture.exchange_s, mixture.exchange_s
    least = coefficients.experts.exposed_ratio
    forward_s = time.forward.device_s + mixture.forward.device_s
    backward_s = time.backward.device_s + mixture.backward.device_s
    # The forward pass of one micro-batch is interleaved with the backward pass of another.
    window_s = (forward_s + backward_s) / 2
    shown_s = estimate_exposed_s(mixture.exchange_s, window_s, least)
    return shown_s, shown_s


@lru_cache(maxsize=8192)
def build_end_times(
    model: ModelShape, shard: Shard, gpu: Gpu, coefficients: Coefficients
) -> tuple[LayerTime, LayerTime]:
    embedding = estimate_layer(build_embedding_work(model, shard), shard, model.head_dim, gpu, coefficients)
    head = estimate_layer(build_head_work(model, shard), shard, model.head_dim, gpu, coefficients)
    return embedding, head
