"""Memory of every pipeline stage of a plan: `model/memory.py` with what a plan says about the run.

A search asks for tens of thousands of plans of one model, so answers are kept by exactly what memory depends on: not
the GPU, the cluster or overlaps, and the number of micro-batches only as far as the pipeline can hold them.
"""

from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.accounting import Layout, StageMemory, estimate_memory
from megatron_hammer.preset_types import ModelPreset
from megatron_hammer.scaling.plan import Plan, Recompute


class _MemoryKey(NamedTuple):
    """What the memory of a plan depends on."""

    model: ModelPreset
    layout: Layout
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    is_16_bit: bool
    recompute: Recompute
    vocab_divisible_by: int


def estimate_plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """The peak of a rank of every pipeline stage; ConfigError for a layout that cannot hold the model."""
    layout = plan.layout
    most_in_flight = layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size + 1)
    return _estimate(
        _MemoryKey(
            model=plan.model,
            layout=layout,
            seq_length=plan.seq_length,
            micro_batch_size=plan.micro_batch_size,
            num_microbatches=min(plan.num_microbatches, most_in_flight),
            is_16_bit=plan.precision != "fp32",
            recompute=plan.recompute,
            vocab_divisible_by=plan.vocab_divisible_by,
        )
    )


@lru_cache(maxsize=1 << 16)
def _estimate(key: _MemoryKey) -> tuple[StageMemory, ...]:
    return estimate_memory(
        key.model,
        key.layout,
        micro_batch_size=key.micro_batch_size,
        seq_length=key.seq_length,
        num_microbatches=key.num_microbatches,
        precision="bf16" if key.is_16_bit else "fp32",
        recompute=key.recompute,
        vocab_divisible_by=key.vocab_divisible_by,
    )
