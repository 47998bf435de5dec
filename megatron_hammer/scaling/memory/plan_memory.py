"""Memory of every pipeline stage of a plan: calls `model/memory.py` with what a plan says about the run.

A search asks for tens of thousands of plans of one model. `model/memory.py` caches what they share, by exactly what it
depends on: not the GPU, the cluster, overlap or replicas, and micro-batches only as far as stages hold them.
"""

from functools import lru_cache
from typing import TypedDict

from megatron_hammer.model.accounting import MemoryOptions, StageMemory, estimate_heaviest_stage, estimate_memory
from megatron_hammer.model.memory_options import WORKSPACE_BYTES
from megatron_hammer.scaling.plan import Plan, Precision, Recompute, Sharding


class Allowances(TypedDict, total=False):
    """What `estimate_memory` adds to the allocated memory, if it is not the default."""

    context_bytes: int
    fragmentation_ratio: float


def estimate_plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """The peak of a rank of every pipeline stage. Raises ConfigError for a layout that cannot hold the model.

    fp16 needs the same memory as bf16. The loss is Megatron's unfused one. Quantized formats keep 16-bit weights too.
    """
    return estimate_memory(
        plan.model,
        plan.layout,
        micro_batch_size=plan.micro_batch_size,
        seq_length=plan.seq_length,
        num_microbatches=_count_relevant_microbatches(plan),
        options=build_plan_options(plan),
        **_list_allowances(plan),
    )


def estimate_heaviest_plan_stage(plan: Plan) -> StageMemory:
    """The stage of `estimate_plan_memory` that needs the most memory. It is several times faster than the list."""
    return estimate_heaviest_stage(
        plan.model,
        plan.layout,
        micro_batch_size=plan.micro_batch_size,
        seq_length=plan.seq_length,
        num_microbatches=_count_relevant_microbatches(plan),
        options=build_plan_options(plan),
        **_list_allowances(plan),
    )


def build_plan_options(plan: Plan) -> MemoryOptions:
    """The memory options of a plan: everything besides its model, layout and batch."""
    return _build_options(
        _is_for_gpu(plan),
        plan.precision,
        plan.recompute,
        plan.sharding,
        plan.shard_size,
        plan.has_flash_attention,
        plan.gradient_bytes,
        plan.vocab_divisible_by,
    )


def _is_for_gpu(plan: Plan) -> bool:
    return plan.cluster.full_speed_processes_per_node is None


def _list_allowances(plan: Plan) -> Allowances:
    """CPU processes have no CUDA context and no caching allocator, so memory.py's allowances for both are zero."""
    return {} if _is_for_gpu(plan) else {"context_bytes": 0, "fragmentation_ratio": 0.0}


def _count_relevant_microbatches(plan: Plan) -> int:
    """The number of micro-batches, up to what the pipeline can hold at once. More change nothing but the cache key."""
    layout = plan.layout
    most_in_flight = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size + 1)
    return min(plan.num_microbatches, most_in_flight)


@lru_cache(maxsize=256)
def _build_options(
    is_for_gpu: bool,
    precision: Precision,
    recompute: Recompute,
    sharding: Sharding,
    shard_size: int | None,
    has_flash_attention: bool,
    gradient_bytes: int,
    vocab_divisible_by: int,
) -> MemoryOptions:
    return MemoryOptions(
        precision="bf16" if precision == "fp16" else precision,
        recompute=recompute,
        sharding=sharding,
        shard_size=shard_size,
        has_flash_attention=has_flash_attention,
        gradient_bytes=gradient_bytes,
        # The fusion is a CUDA kernel (fused_weight_gradient_mlp_cuda in megatron.core.tensor_parallel.layers).
        has_fused_weight_gradients=is_for_gpu,
        workspace_bytes=WORKSPACE_BYTES if is_for_gpu else 0,
        vocab_divisible_by=vocab_divisible_by,
    )
