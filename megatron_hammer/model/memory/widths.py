"""How wide the tensors of a layer are on one rank: what the counts of its activations share."""

from typing import NamedTuple

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.options import Batch
from megatron_hammer.model.shape import ModelShape


class Widths(NamedTuple):
    """Elements per token on one rank, cut over the tensor-parallel ranks; h is not."""

    tokens: int  # of the context-parallel rank
    sequence_tokens: int  # of these, the share of a sequence-parallel rank
    queries: int
    key_values: int  # of the keys alone
    values: int
    outputs: int  # of attention, which linear_proj takes
    heads: int


def cut_widths(model: ModelShape, layout: ParallelLayout, batch: Batch) -> Widths:
    tp = layout.tensor_model_parallel_size
    tokens = batch.count_tokens(layout.context_parallel_size)
    num_groups = max(1, model.num_query_groups // tp)
    return Widths(
        tokens=tokens,
        sequence_tokens=tokens // tp if layout.has_sequence_parallel else tokens,
        queries=model.num_attention_heads * model.head_dim // tp,
        key_values=num_groups * model.head_dim,
        values=num_groups * model.value_dim,
        outputs=model.num_attention_heads * model.value_dim // tp,
        heads=model.num_attention_heads // tp,
    )
