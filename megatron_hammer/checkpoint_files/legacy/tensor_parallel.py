"""What one tensor-parallel rank holds of a tensor, as pairs of pure functions, each the exact inverse of the other.

`split_x(tensor, n)` is the list of what ranks 0 to n-1 hold, `merge_x` puts it together again. `select_rank_layout`
says which tensor of Megatron takes which. No arithmetic and no IO; reader.py finds the files.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.errors import ConversionError


def split_columns(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """Column parallel: rank r holds the r-th block of rows [o/n, ...] of a weight or bias [o, ...].

    Rows of QKV are whole groups or, with fewer groups than ranks, plain parts of one: megatron gathers them again.
    Rows of an embedding are tokens. Raises ConversionError if the rows are not a multiple of the ranks.
    Source: megatron.core ColumnParallelLinear and VocabParallelEmbedding.
    """
    return _split_axis(weight, num_ranks, axis=0)


def merge_columns(parts: Sequence[Tensor]) -> Tensor:
    """Exact inverse of `split_columns`."""
    return _merge_axis(parts, axis=0)


def split_rows(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """Row parallel: rank r holds the r-th block of columns [o, i/n] of a weight [o, i].

    Raises ConversionError if the columns are not a multiple of the ranks. Source: megatron.core RowParallelLinear.
    """
    return _split_axis(weight, num_ranks, axis=1)


def merge_rows(parts: Sequence[Tensor]) -> Tensor:
    """Exact inverse of `split_rows`."""
    return _merge_axis(parts, axis=1)


def split_gated_columns(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """Column parallel linear_fc1 of a gated MLP: rank r holds its rows of the gate, then its rows of up.

    weight: [2*f, ...], gate before up; each part [2*f/n, ...]. Raises ConversionError if f is not a multiple of n.
    Source: megatron.core MLP.forward chunks the output of each rank in two.
    """
    if weight.shape[0] % 2:
        raise _not_divisible("gate and up", weight.shape[0], 2)
    gate, up = weight.chunk(2)
    pairs = zip(split_columns(gate, num_ranks), split_columns(up, num_ranks), strict=True)
    return [torch.cat(pair) for pair in pairs]


def merge_gated_columns(parts: Sequence[Tensor]) -> Tensor:
    """Exact inverse of `split_gated_columns`."""
    _require_same_shapes(parts)
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
    ([n, 3, d], with groups [g, n/g + 2, d]). Raises ConversionError for another version or rows that are no heads.
    Source: megatron.training.checkpointing.fix_query_key_value_ordering.
    """
    if checkpoint_version in (2, 3):
        return qkv
    rows = _count_qkv_heads(qkv, checkpoint_version, head_dim)
    rest = qkv.shape[1:]
    if checkpoint_version == 0:
        return qkv.reshape(3, rows, head_dim, *rest).transpose(0, 1).reshape(qkv.shape)
    return qkv.reshape(rows, head_dim, 3, *rest).transpose(1, 2).reshape(qkv.shape)


def order_qkv_by_version(qkv: Tensor, *, checkpoint_version: float, head_dim: int) -> Tensor:
    """Exact inverse of `order_qkv_by_heads`: how a checkpoint of that version keeps it."""
    if checkpoint_version in (2, 3):
        return qkv
    rows = _count_qkv_heads(qkv, checkpoint_version, head_dim)
    by_heads = qkv.reshape(rows, 3, head_dim, *qkv.shape[1:])
    if checkpoint_version == 0:
        return by_heads.transpose(0, 1).reshape(qkv.shape)
    return by_heads.transpose(1, 2).reshape(qkv.shape)


def _count_qkv_heads(qkv: Tensor, checkpoint_version: float, head_dim: int) -> int:
    if checkpoint_version not in (0, 1):
        raise ConversionError(
            f"checkpoint_version: the order of query_key_value is defined for 0, 1, 2 and 3, got {checkpoint_version}. "
            "Load the checkpoint with the Megatron that wrote it and save it again."
        )
    if qkv.shape[0] % (3 * head_dim):
        raise _not_divisible("q, k and v of every head", qkv.shape[0], 3 * head_dim)
    return qkv.shape[0] // (3 * head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """A pair of exact inverses between a tensor and its parts on the ranks, and the axis that is cut; None: none is."""

    axis: int | None
    split: Callable[[Tensor, int], list[Tensor]]
    merge: Callable[[Sequence[Tensor]], Tensor]


def split_replicated(tensor: Tensor, num_ranks: int) -> list[Tensor]:
    """Every rank holds the whole tensor."""
    return [tensor] * num_ranks


def merge_replicated(parts: Sequence[Tensor]) -> Tensor:
    """Exact inverse of `split_replicated`; raises ConversionError if the ranks do not hold the same bits."""
    for rank, part in enumerate(parts):
        if not has_same_bits(parts[0], part):
            raise ConversionError(
                f"replicated tensor: must be equal on all ranks, got a difference between 0 and {rank}. "
                "The ranks are of different runs; use another iteration."
            )
    return parts[0]


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality of bits: a NaN equals itself, and zero does not equal minus zero."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)))


COLUMN = RankLayout(axis=0, split=split_columns, merge=merge_columns)
GATED_COLUMN = RankLayout(axis=0, split=split_gated_columns, merge=merge_gated_columns)
ROW = RankLayout(axis=1, split=split_rows, merge=merge_rows)
REPLICATED = RankLayout(axis=None, split=split_replicated, merge=merge_replicated)

# On mcore's names without the layer; the first row that matches whole counts.
_RANK_LAYOUTS: tuple[tuple[str, RankLayout], ...] = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", COLUMN),
    (r"embedding\.position_embeddings\.weight", REPLICATED),
    (r"embedding\.norm\.(weight|bias)", REPLICATED),
    (r"self_attention\.linear_qkv\.(weight|bias)", COLUMN),
    (r"self_attention\.linear_proj\.weight", ROW),
    (r"self_attention\.linear_proj\.bias", REPLICATED),
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


def _split_axis(tensor: Tensor, num_ranks: int, *, axis: int) -> list[Tensor]:
    if tensor.shape[axis] % num_ranks:
        raise _not_divisible("one block for each rank", tensor.shape[axis], num_ranks)
    return [part.contiguous() for part in tensor.chunk(num_ranks, dim=axis)]


def _merge_axis(parts: Sequence[Tensor], *, axis: int) -> Tensor:
    _require_same_shapes(parts)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)


def _require_same_shapes(parts: Sequence[Tensor]) -> None:
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        raise ConversionError(
            f"parts: must have one shape on all ranks, got {shapes}. The ranks are of different runs; "
            "use another iteration."
        )


def _not_divisible(what: str, size: int, divisor: int) -> ConversionError:
    return ConversionError(
        f"rows: must hold {what}, got size={size}, which {divisor} does not divide. Check the parallel sizes."
    )
