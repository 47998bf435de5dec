"""Memory of every pipeline stage of a plan: `model/memory.py` with what a plan says about the run.

A search asks for tens of thousands of plans of one model, so answers are kept by exactly what memory depends on: not
the GPU, the cluster or overlaps, and the number of micro-batches only as far as the pipeline can hold them.
"""

from functools import lru_cache

from megatron_hammer.model.accounting import Layout, MemoryOptions, StageMemory, estimate_memory
from megatron_hammer.preset_types import ModelPreset
from megatron_hammer.scaling.plan import Plan, Precision, Recompute, Sharding


def estimate_plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """The peak of a rank of every pipeline stage; ConfigError for a layout that cannot hold the model.

    fp16 is kept as bf16 is. The loss is Megatron's unfused one; quantized formats keep 16-bit weights beside them.
    """
    layout = plan.layout
    most_in_flight = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size + 1)
    return _estimate(
        plan.model,
        layout,
        plan.seq_length,
        plan.micro_batch_size,
        min(plan.num_microbatches, most_in_flight),
        _build_options(
            plan.precision,
            plan.recompute,
            plan.sharding,
            plan.shard_size,
            plan.has_flash_attention,
            plan.gradient_bytes,
            plan.vocab_divisible_by,
        ),
    )


@lru_cache(maxsize=256)
def _build_options(
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
        vocab_divisible_by=vocab_divisible_by,
    )


@lru_cache(maxsize=1 << 16)
def _estimate(
    model: ModelPreset,
    layout: Layout,
    seq_length: int,
    micro_batch_size: int,
    num_microbatches: int,
    options: MemoryOptions,
) -> tuple[StageMemory, ...]:
    return estimate_memory(
        model,
        layout,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        num_microbatches=num_microbatches,
        options=options,
    )
