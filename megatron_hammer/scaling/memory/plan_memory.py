"""Memory of the heaviest pipeline stage of a plan: calls `model/memory.py` with what a plan says about the run.

A search asks for tens of thousands of plans of one model. `model/memory.py` caches what they share, by exactly what it
depends on: not the GPU, the cluster, overlap or replicas, and micro-batches only as far as stages hold them.
"""

from functools import lru_cache
from typing import Any

from megatron_hammer.model.accounting import MemoryOptions, StageMemory, estimate_memory
from megatron_hammer.model.memory_options import WORKSPACE_BYTES
from megatron_hammer.scaling.plan import Plan, Precision, Recompute, Sharding


def estimate_heaviest_plan_stage(plan: Plan) -> StageMemory:
    """The peak of a rank of the pipeline stage that needs the most. Raises ConfigError if the model does not fit in.

    fp16 needs the same memory as bf16. The loss is in place. Quantized formats keep 16-bit weights too.
    """
    stages = estimate_memory(plan.model, plan.layout, **build_memory_run(plan), only_heaviest=True)
    return max(stages, key=lambda stage: stage.total_bytes)


def build_memory_run(plan: Plan) -> dict[str, Any]:
    """A plan without its model and layout, as the arguments of `estimate_memory`."""
    is_for_gpu = plan.cluster.full_speed_processes_per_node is None
    # CPU processes have no CUDA context and no caching allocator, so the allowances for both are zero.
    allowances = {} if is_for_gpu else {"context_bytes": 0, "fragmentation_ratio": 0.0}
    options = _build_options(
        is_for_gpu,
        plan.precision,
        plan.recompute,
        plan.sharding,
        plan.shard_size,
        plan.has_flash_attention,
        plan.gradient_bytes,
        plan.vocab_divisible_by,
    )
    return {
        "micro_batch_size": plan.micro_batch_size,
        "seq_length": plan.seq_length,
        "num_microbatches": _count_relevant_microbatches(plan),
        "options": options,
        **allowances,
    }


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
        cross_entropy="in-place",
        gradient_bytes=gradient_bytes,
        # The fusion is a CUDA kernel (fused_weight_gradient_mlp_cuda in megatron.core.tensor_parallel.layers).
        has_fused_weight_gradients=is_for_gpu,
        workspace_bytes=WORKSPACE_BYTES if is_for_gpu else 0,
        vocab_divisible_by=vocab_divisible_by,
    )
