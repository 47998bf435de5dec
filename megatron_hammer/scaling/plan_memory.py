"""Memory of the heaviest pipeline stage of a plan: calls `model/memory/` with what a plan says about the run.

A search asks for tens of thousands of plans of one model. `model/memory/` caches what they share, by exactly what it
depends on: not the GPU, the cluster, overlap or replicas, and micro-batches only as far as stages hold them.
"""

from functools import lru_cache
from typing import Any

from megatron_hammer.model.accounting import MemoryOptions, StageMemory, estimate_memory
from megatron_hammer.model.memory.estimate import EXPANDABLE_FRAGMENTATION_RATIO
from megatron_hammer.model.memory.options import WORKSPACE_BYTES
from megatron_hammer.scaling.plan import LOW_PRECISIONS, Plan

# Fields of MemoryOptions that a plan has under the same name.
SHARED_FIELDS = (
    "recompute", "recompute_modules", "sharding", "shard_size", "has_flash_attention", "gradient_bytes",
    "vocab_divisible_by", "has_quantized_parameters", "num_offloaded_layers", "offload_modules",
    "optimizer_offload_ratio", "master_bytes", "moments_bytes",
)  # fmt: skip


def estimate_heaviest_plan_stage(plan: Plan) -> StageMemory:
    """The peak of a rank of the pipeline stage that needs the most. Raises ConfigError if the model does not fit in.

    fp16 needs the same memory as bf16. The loss is in place.
    """
    stages = estimate_memory(plan.model, plan.layout, **build_memory_run(plan), only_heaviest=True)
    return max(stages, key=lambda stage: stage.total_bytes)


def fits_in_memory(plan: Plan) -> bool:
    """Whether its heaviest stage fits into the whole memory of its GPU."""
    return estimate_heaviest_plan_stage(plan).total_bytes <= plan.gpu.memory_bytes


def build_memory_run(plan: Plan) -> dict[str, Any]:
    """A plan without its model and layout, as the arguments of `estimate_memory`."""
    is_for_gpu = plan.cluster.full_speed_processes_per_node is None
    # CPU processes have no CUDA context and no caching allocator, so the allowances for both are zero. Launch scripts
    # of a plan switch expandable segments on.
    allowances: dict[str, Any] = {"fragmentation_ratio": EXPANDABLE_FRAGMENTATION_RATIO}
    if not is_for_gpu:
        allowances = {"context_bytes": 0, "fragmentation_ratio": 0.0}
    return {
        "micro_batch_size": plan.micro_batch_size,
        "seq_length": plan.seq_length,
        "num_microbatches": _count_relevant_microbatches(plan),
        "options": _build_options(
            is_for_gpu,
            plan.recompute_num_layers,
            _select_memory_precision(plan),
            # Blackwell, which also has units for 4 bits, multiplies per-tensor fp8 in every layout.
            plan.precision != "fp8" or plan.gpu.fp4_tflops is None,
            plan.experts.imbalance_ratio,
            plan.context_exchange == "a2a",
            tuple(getattr(plan, name) for name in SHARED_FIELDS),
        ),
        **allowances,
    }


def _select_memory_precision(plan: Plan) -> str:
    # Without lasting 8-bit copies, 8-bit training needs the memory of 16 bits too.
    is_16_bit = plan.precision == "fp16" or (plan.precision in LOW_PRECISIONS and not plan.keeps_quantized_copies)
    return "bf16" if is_16_bit else plan.precision


def _count_relevant_microbatches(plan: Plan) -> int:
    """The number of micro-batches, up to what the pipeline can hold at once. More change nothing but the cache key."""
    layout = plan.layout
    most_in_flight = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size + 1)
    return min(plan.num_microbatches, most_in_flight)


@lru_cache(maxsize=256)
def _build_options(
    is_for_gpu: bool,
    recompute_num_layers: int | None,
    precision: Any,
    has_transposed_weights: bool,
    expert_imbalance_ratio: float,
    is_context_parallel_all_to_all: bool,
    shared: tuple[Any, ...],
) -> MemoryOptions:
    fields = dict(zip(SHARED_FIELDS, shared, strict=True))
    return MemoryOptions(
        precision=precision,
        recompute_method="uniform" if recompute_num_layers is None else "block",
        recompute_num_layers=recompute_num_layers,
        has_transposed_weights=has_transposed_weights,
        expert_imbalance_ratio=expert_imbalance_ratio,
        is_context_parallel_all_to_all=is_context_parallel_all_to_all,
        matrix_moments_bytes=fields["moments_bytes"],
        cross_entropy="in-place",
        # The fusion is a CUDA kernel (fused_weight_gradient_mlp_cuda in megatron.core.tensor_parallel.layers).
        has_fused_weight_gradients=is_for_gpu,
        workspace_bytes=WORKSPACE_BYTES if is_for_gpu else 0,
        **fields,
    )
