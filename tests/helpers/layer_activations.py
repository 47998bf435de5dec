"""The activations of one layer as the paper states them: of one sequence."""

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.activations import estimate_layer_activations
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.model.shape import ModelShape


def count_layer_activation_bytes(
    model: ModelShape, layout: ParallelLayout, *, num_tokens: int, options: MemoryOptions | None = None
) -> int:
    """Activations that one layer keeps for its backward pass on one rank, one sequence of `num_tokens` tokens."""
    batch = Batch(micro_batch_size=1, seq_length=num_tokens * layout.context_parallel_size)
    return estimate_layer_activations(model, layout, batch, options or MemoryOptions()).kept
