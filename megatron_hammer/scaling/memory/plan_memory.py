"""Memory of every pipeline stage of a plan: `model/memory.py` with what a plan says about the run.

A search asks for tens of thousands of plans of one model. What they share is kept in `model/memory.py` by exactly what
it depends on: not the GPU, the cluster, overlaps or model copies, and micro-batches only as far as stages hold them.
"""

from functools import lru_cache
from typing import TypedDict

from megatron_hammer.model.accounting import MemoryOptions, StageMemory, estimate_heaviest_stage, estimate_memory
from megatron_hammer.model.memory_options import WORKSPACE_BYTES
from megatron_hammer.scaling.plan import Plan, Precision, Recompute, Sharding


class Allowances(TypedDict, total=False):
    """What `estimate_memory` adds to what is allocated, where it is not the default."""

    context_bytes: int
    fragmentation_ratio: float


def estimate_plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """The peak of a rank of every pipeline stage; ConfigError for a layout that cannot hold the model.

    fp16 is kept as bf16 is. The loss is Megatron's unfused one; quantized formats keep 16-bit weights beside them.
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
    """The stage of `estimate_plan_memory` that needs most, several times as fast."""
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
    """What a plan says of memory beside its model, layout and batch."""
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
    """CPU processes have no CUDA context and no caching allocator, as memory.py has it."""
    return {} if _is_for_gpu(plan) else {"context_bytes": 0, "fragmentation_ratio": 0.0}


def _count_relevant_microbatches(plan: Plan) -> int:
    """More than the pipeline can hold at once change nothing; so that more of them share an answer."""
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
        has_fused_weight_gradients=is_for_gpu,
        workspace_bytes=WORKSPACE_BYTES if is_for_gpu else 0,
        vocab_divisible_by=vocab_divisible_by,
    )
