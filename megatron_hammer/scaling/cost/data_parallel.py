"""What data parallelism adds to a step: gradients summed, parameters gathered, and the optimizer's own work.

Source: Rajbhandari et al. 2020, arXiv 1910.02054 (ZeRO 1 to 3); megatron.core.distributed for what runs beside what.
"""

from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.accounting import (
    ParallelLayout,
    RankParameters,
    count_stage_parameters,
    padded_vocab_size,
)
from megatron_hammer.model.layout import count_shards
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.communication import (
    Group,
    estimate_all_reduce_s,
    estimate_exposed_s,
    estimate_gather_s,
    place_group,
)
from megatron_hammer.scaling.cost.host_offload import estimate_host_optimizer_s
from megatron_hammer.scaling.cost.layer_cost import list_layer_kinds
from megatron_hammer.scaling.cost.pipeline import StageKind
from megatron_hammer.scaling.plan import Plan

# Bytes that the optimizer moves per parameter of its shard. The gradient is read for the norm (4). Gradient, master
# weight and two moments are read (16), and the last three are written (12). The 16-bit weight is written (2) and then
# copied (2).
OPTIMIZER_BYTES_PER_PARAMETER = 36


LEAST_BUCKET_PARAMETERS, BUCKET_PARAMETERS_PER_RANK = 40_000_000, 1_000_000


class DataTraffic(NamedTuple):
    """Seconds of the communication over data-parallel ranks, before any of it is hidden."""

    reduce_s: float  # over the ranks that share one copy of what is sharded
    gather_s: float
    sum_s: float  # over the copies, if there are several


class DataParallelTime(NamedTuple):
    """Seconds per step of a stage's communication over data-parallel ranks, beside its passes and outside of them.

    embedding_s: the sum of a tied embedding's gradients over the first and the last stage, which nothing hides.
    """

    exposed_reduce_s: float
    exposed_gather_s: float
    hidden_reduce_s: float
    hidden_gather_s: float
    embedding_s: float

    @property
    def exposed_s(self) -> float:
        return self.exposed_reduce_s + self.exposed_gather_s + self.embedding_s


@lru_cache(maxsize=8192)
def _count_stage_parameters(
    model: ModelShape, tp: int, ep: int, expert_tp: int, counts: tuple[int, ...], ends: tuple[bool, bool], multiple: int
) -> RankParameters:
    """Parameters of one rank of a stage. counts: of its layers, by list_layer_kinds. ends: the embedding, the head."""
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
        # Enough ranks for whole blocks of experts. The number of parameters per rank does not depend on it.
        data_parallel_size=ep * expert_tp,
        has_sequence_parallel=True,
    )
    models, _ = list_layer_kinds(model)
    kinds = list(zip(models, counts, strict=True))
    has_embedding, has_head = ends
    return count_stage_parameters(
        model, layout, kinds, has_embedding=has_embedding, has_head=has_head, vocab_divisible_by=multiple
    )


def _count_kind_parameters(plan: Plan, kind: StageKind) -> RankParameters:
    """Parameters of one rank of a stage; of so many average layers where it does not say which kinds they are of."""
    model, layout = plan.model, plan.layout
    cut = (model, layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tp)
    ends, multiple = (kind.has_embedding, kind.has_head), plan.vocab_divisible_by
    if model.is_uniform:
        return _count_stage_parameters(*cut, (kind.num_layers,), ends, multiple)
    if kind.kind_counts:
        return _count_stage_parameters(*cut, kind.kind_counts, ends, multiple)
    models, numbers = list_layer_kinds(model)
    none = (0,) * len(models)
    layers = _count_stage_parameters(*cut, tuple(map(numbers.count, range(len(models)))), (False, False), multiple)
    end = _count_stage_parameters(*cut, none, ends, multiple)
    dense, expert = (round(kind.num_layers * part / model.num_layers) for part in (layers.dense, layers.expert))
    return RankParameters(dense=dense + end.dense, expert=expert)


def _estimate_traffic(plan: Plan, parameters: RankParameters, coefficients: Coefficients) -> DataTraffic:
    """Reduction of gradients and gathering of parameters, before any of it is hidden.

    ZeRO-1 is a reduce-scatter and an all-gather (Rajbhandari et al. 2020, arXiv 1910.02054, section 7). If there are
    fewer shards than ranks (shard_size), gradients are also summed over the copies of each shard.
    """
    layout, cluster = plan.layout, plan.cluster
    weight_bytes = 4 if plan.precision == "fp32" else 2
    reduce_s = gather_s = sum_s = 0.0
    dense, expert = count_shards(layout, None)
    dense_shards, expert_shards = _count_shards(plan)
    block = layout.expert_tp * layout.expert_model_parallel_size
    for number, size, shards, stride in (
        (parameters.dense, dense, dense_shards, layout.tensor_model_parallel_size),
        (parameters.expert, expert, expert_shards, block),
    ):
        if number == 0 or size == 1:
            continue
        gradient_bytes = plan.gradient_bytes * number
        buckets = _count_buckets(plan, number, size)
        if plan.sharding == "none":
            group = place_group(size, stride, cluster)
            reduce_s += estimate_all_reduce_s(gradient_bytes, group, cluster, coefficients, buckets)
            continue
        group = place_group(shards, stride, cluster)
        reduce_s += estimate_gather_s(gradient_bytes, group, cluster, coefficients, buckets)
        gather_s += estimate_gather_s(weight_bytes * number, group, cluster, coefficients, buckets)
        copies = place_group(size // shards, stride * shards, cluster)
        sum_s += estimate_all_reduce_s(gradient_bytes / shards, copies, cluster, coefficients, buckets)
    return DataTraffic(reduce_s, gather_s, sum_s)


def _count_buckets(plan: Plan, num_parameters: int, num_replicas: int) -> int:
    """Collectives that the gradients are reduced in. FSDP has one for each layer, which the caller counts.

    Source: DistributedDataParallel of megatron.core: a bucket grows with the group, so that latency stays bearable.
    """
    if plan.sharding == "fsdp" or not plan.overlaps_grad_reduce:
        return 1
    return -(-num_parameters // max(LEAST_BUCKET_PARAMETERS, BUCKET_PARAMETERS_PER_RANK * num_replicas))


def _count_shards(plan: Plan) -> tuple[int, int]:
    """Parts into which the ranks that hold the same dense parameters, or the same experts, split what is sharded."""
    return (1, 1) if plan.sharding == "none" else count_shards(plan.layout, plan.shard_size)


def build_data_parallel_time(
    plan: Plan, kind: StageKind, forward_s: float, backward_s: float, coefficients: Coefficients
) -> DataParallelTime:
    """Gradients are reduced beside the last backward pass, and parameters gathered beside the first forward pass.

    forward_s, backward_s: of one micro-batch on this kind of stage.
    """
    reduce_s, gather_s, sum_s = _estimate_traffic(plan, _count_kind_parameters(plan, kind), coefficients)
    # FSDP communicates in every layer, which estimate_fsdp_s counts. Copies of its shards are summed once per step.
    reduce_s, gather_s = (sum_s, 0.0) if plan.sharding == "fsdp" else (reduce_s + sum_s, gather_s)
    least = coefficients.data_exposed_ratio
    exposed_reduce_s, exposed_gather_s = reduce_s, gather_s
    if plan.overlaps_grad_reduce:
        exposed_reduce_s = estimate_exposed_s(reduce_s, backward_s, least)
    if plan.overlaps_param_gather:
        exposed_gather_s = estimate_exposed_s(gather_s, forward_s, least)
    return DataParallelTime(
        exposed_reduce_s,
        exposed_gather_s,
        reduce_s - exposed_reduce_s,
        gather_s - exposed_gather_s,
        _estimate_tied_embedding_s(plan, coefficients),
    )


def _estimate_tied_embedding_s(plan: Plan, coefficients: Coefficients) -> float:
    """The first and the last stage both hold a tied embedding; they sum its gradients after everything else."""
    pp = plan.layout.pipeline_model_parallel_size
    if pp == 1 or not plan.model.has_tied_embeddings:
        return 0.0
    stride = plan.layout.world_size // pp
    is_inside = plan.layout.world_size <= plan.cluster.nvlink_domain_size
    group = Group(2, 2 if is_inside else 1, stride * (pp - 1))
    tp = plan.layout.tensor_model_parallel_size
    rows = padded_vocab_size(plan.model.vocab_size, divisible_by=plan.vocab_divisible_by, tensor_model_parallel_size=tp)
    num_bytes = plan.gradient_bytes * rows * plan.model.hidden_size / tp
    # Nothing hides it: finalize_model_grads of megatron.core calls _allreduce_word_embedding_grads after it has
    # finished the data-parallel reduction.
    return estimate_all_reduce_s(num_bytes, group, plan.cluster, coefficients)


def estimate_fsdp_s(plan: Plan, forward_s: float, backward_s: float, coefficients: Coefficients) -> float:
    """Per layer and micro-batch: what is not hidden of gathering weights for both passes and of reducing gradients.

    FSDP is ZeRO-3 of Rajbhandari et al. 2020 (arXiv 1910.02054, section 5.3).

    forward_s, backward_s: of one layer over one micro-batch.
    """
    one_layer = StageKind(1, False, False, 1)
    traffic = _estimate_traffic(plan, _count_kind_parameters(plan, one_layer), coefficients)
    least = coefficients.fsdp_exposed_ratio
    shown_s = estimate_exposed_s(traffic.gather_s, forward_s, least)
    return shown_s + estimate_exposed_s(traffic.gather_s + traffic.reduce_s, backward_s, least)


def estimate_hidden_fsdp_s(
    plan: Plan, forward_s: float, backward_s: float, coefficients: Coefficients
) -> tuple[float, float]:
    """What estimate_fsdp_s leaves out, because it runs beside the forward and the backward pass of a layer."""
    one_layer = StageKind(1, False, False, 1)
    traffic = _estimate_traffic(plan, _count_kind_parameters(plan, one_layer), coefficients)
    least = coefficients.fsdp_exposed_ratio
    forward, backward = traffic.gather_s, traffic.gather_s + traffic.reduce_s
    return (
        forward - estimate_exposed_s(forward, forward_s, least),
        backward - estimate_exposed_s(backward, backward_s, least),
    )


def estimate_optimizer_s(plan: Plan, coefficients: Coefficients) -> float:
    """Adam over the shard of the heaviest stage, bound by memory, and the clearing of the gradient buffer."""
    layout = plan.layout
    kinds = ((True, layout.pipeline_model_parallel_size == 1), (False, True))
    num_layers = -(-(plan.model.num_layers + plan.model.num_mtp_layers) // layout.pipeline_model_parallel_size)
    heaviest = max(
        (_count_kind_parameters(plan, StageKind(num_layers, *ends, 1)) for ends in kinds), key=lambda one: one.total
    )
    dense_shards, expert_shards = _count_shards(plan)
    own_shard = heaviest.dense / dense_shards + heaviest.expert / expert_shards
    # The buffer to be cleared has the gradients of all parameters of the rank; with FSDP only those of its shard.
    local = own_shard if plan.sharding == "fsdp" else heaviest.total
    offloaded = plan.optimizer_offload_ratio * own_shard
    num_bytes = OPTIMIZER_BYTES_PER_PARAMETER * (own_shard - offloaded) + plan.gradient_bytes * local
    own = coefficients.select_gpu(plan.gpu)
    host_s = estimate_host_optimizer_s(offloaded, plan.cluster)
    return num_bytes / (own.memory_ratio * plan.gpu.memory_bytes_per_s) + host_s
