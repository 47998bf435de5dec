"""How the parts of a tensor on tensor-parallel ranks are put together again.

`select_rank_layout` says which tensor of Megatron is cut in which way. No arithmetic and no IO; reader.py finds the
files, and has found the parts of a tensor to have one shape.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.errors import ConversionError


def merge_columns(parts: Sequence[Tensor]) -> Tensor:
    """Column parallel: rank r holds the r-th block of rows [o/n, ...] of a weight or bias [o, ...].

    Rows of QKV are whole groups or, with fewer groups than ranks, plain parts of one: megatron gathers them again.
    Rows of an embedding are tokens. Source: megatron.core ColumnParallelLinear and VocabParallelEmbedding.
    """
    return _merge_axis(parts, axis=0)


def merge_rows(parts: Sequence[Tensor]) -> Tensor:
    """Row parallel: rank r holds the r-th block of columns [o, i/n] of a weight [o, i].

    Source: megatron.core RowParallelLinear.
    """
    return _merge_axis(parts, axis=1)


def merge_gated_columns(parts: Sequence[Tensor]) -> Tensor:
    """Column parallel linear_fc1 of a gated MLP: rank r holds its rows of the gate, then its rows of up.

    parts: [2*f/n, ...] each. Returns [2*f, ...], gate before up. Raises ConversionError for an odd number of rows.
    Source: megatron.core MLP.forward chunks the output of each rank in two.
    """
    if parts[0].shape[0] % 2:
        raise _not_divisible("gate and up of a rank", parts[0].shape[0], 2)
    if len(parts) == 1:
        return parts[0]
    halves = [part.chunk(2) for part in parts]
    return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def order_qkv_by_heads(qkv: Tensor, *, checkpoint_version: float, head_dim: int) -> Tensor:
    """One rank's query_key_value of an old checkpoint in today's order: q, k and v of head 0, then of head 1, ...

    qkv: [3*n*d, ...] with n heads of size d on this rank. Version 0 keeps all queries, then all keys, then all values
    ([3, n, d]); version 1 keeps q, k and v of one element of a head together ([n, d, 3]); 2 and 3 are today's order
    ([n, 3, d], with groups [g, n/g + 2, d]). Raises ConversionError for rows that are no heads.
    Source: megatron.training.checkpointing.fix_query_key_value_ordering.
    """
    if checkpoint_version in (2, 3):
        return qkv
    if qkv.shape[0] % (3 * head_dim):
        raise _not_divisible("q, k and v of every head", qkv.shape[0], 3 * head_dim)
    rest = qkv.shape[1:]
    if checkpoint_version == 0:
        return qkv.reshape(3, -1, head_dim, *rest).transpose(0, 1).reshape(qkv.shape)
    return qkv.reshape(-1, head_dim, 3, *rest).transpose(1, 2).reshape(qkv.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """How a tensor lies on the ranks. axis: the one that is cut, if any. merge: from the parts in their order."""

    axis: int | None
    merge: Callable[[Sequence[Tensor]], Tensor]


COLUMN = RankLayout(axis=0, merge=merge_columns)
GATED_COLUMN = RankLayout(axis=0, merge=merge_gated_columns)
ROW = RankLayout(axis=1, merge=merge_rows)
# Every rank holds the whole tensor. reader.py makes one part of them and compares its copies.
REPLICATED = RankLayout(axis=None, merge=lambda parts: parts[0])

# On mcore's names without the layer; the first row that matches whole counts.
_RANK_LAYOUTS: tuple[tuple[str, RankLayout], ...] = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", COLUMN),
    (r"embedding\.position_embeddings\.weight", REPLICATED),
    (r"embedding\.norm\.(weight|bias)", REPLICATED),
    (r"self_attention\.linear_qkv\.(weight|bias)", COLUMN),
    (r"self_attention\.linear_proj\.weight", ROW),
    (r"self_attention\.linear_proj\.bias", REPLICATED),  # added once, after the sum over the ranks
    (r"self_attention\.[qk]_layernorm\.(weight|bias)", REPLICATED),
    (r"mlp\.(shared_experts\.|experts\.experts\.\d+\.)?linear_fc1\.(weight|bias)", GATED_COLUMN),
    (r"mlp\.(shared_experts\.|experts\.experts\.\d+\.)?linear_fc2\.weight", ROW),
    (r"mlp\.(shared_experts\.|experts\.experts\.\d+\.)?linear_fc2\.bias", REPLICATED),
    (r"mlp\.shared_experts\.gate_weight", REPLICATED),
    (r"mlp\.router\.(weight|bias|expert_bias)", REPLICATED),
    (r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_(weight|bias)", REPLICATED),
    (r"(input_layernorm|pre_mlp_layernorm|decoder\.final_layernorm)\.(weight|bias)", REPLICATED),
)
_LAYER_PREFIX = re.compile(r"^decoder\.layers\.\d+\.")


def select_rank_layout(name: str, *, is_gated: bool) -> RankLayout | None:
    """How the tensor of that mcore name lies on tensor-parallel ranks; None where no row of the table says.

    is_gated: whether linear_fc1 holds gate and up.
    """
    local_name = _LAYER_PREFIX.sub("", name)
    for pattern, layout in _RANK_LAYOUTS:
        if re.fullmatch(pattern, local_name):
            return COLUMN if layout is GATED_COLUMN and not is_gated else layout
    return None


def _merge_axis(parts: Sequence[Tensor], *, axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)


def _not_divisible(what: str, size: int, divisor: int) -> ConversionError:
    return ConversionError(
        f"rows: must hold {what}, got size={size}, which {divisor} does not divide. Check the parallel sizes."
    )
