"""How Megatron and Hugging Face arrange the same numbers: pairs of pure functions, each the exact inverse of the other.

No arithmetic, no IO, no names of checkpoints; the families (families/) say which tensor takes which layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.rotary_rows import permute_rope, unpermute_rope
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape


def split_qkv(qkv: Tensor, *, num_query_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split Megatron's fused QKV weight or bias into HF's q, k and v; exact inverse of `merge_qkv`.

    qkv: [(n + 2*g) * d, ...]; each of the g groups stores its n/g query heads, then one key, then one value.
    Returns q [n*d, ...], k [g*d, ...], v [g*d, ...]: contiguous, views of qkv where its rows allow it, no arithmetic.
    Raises ConversionError if qkv.shape[0] is not a multiple of g * d that leaves a query head, naming both numbers.
    Source: row order of megatron.core SelfAttention.linear_qkv; pinned by tests/numerics/test_qkv_layout.py.
    """
    num_rows, group_rows = qkv.shape[0], num_query_groups * head_dim
    # A group has at least one query head, one key and one value.
    if num_rows % group_rows or num_rows // group_rows < 3:
        raise ConversionError(
            f"qkv: rows must be a multiple of num_query_groups * head_dim, at least 3 of them, got rows={num_rows}, "
            f"num_query_groups * head_dim={group_rows}. Check num_query_groups and kv_channels."
        )
    heads_per_group = num_rows // group_rows - 2
    rest = qkv.shape[1:]
    grouped = qkv.reshape(num_query_groups, heads_per_group + 2, head_dim, *rest)
    query, key, value = grouped.split([heads_per_group, 1, 1], dim=1)
    # Row order of q, k and v in transformers: head 0, head 1, ... The heads of a group are neighbours there too, so no
    # head changes its place among its kind.
    return query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)


def merge_qkv(query: Tensor, key: Tensor, value: Tensor, *, num_query_groups: int, head_dim: int) -> Tensor:
    """Fuse HF's q, k and v into Megatron's QKV; exact inverse of `split_qkv`, whose shapes these are.

    Raises ConversionError if the rows of q, k or v are not whole heads of every group.
    """
    group_rows = num_query_groups * head_dim
    if query.shape[0] % group_rows or query.shape[0] == 0 or key.shape[0] != group_rows or value.shape != key.shape:
        raise ConversionError(
            f"qkv: rows of k and v must be num_query_groups * head_dim and those of q a multiple of it, got "
            f"q={query.shape[0]}, k={key.shape[0]}, v={value.shape[0]}, num_query_groups * head_dim={group_rows}. "
            "Check num_key_value_heads and head_dim."
        )
    rest = query.shape[1:]
    # One axis for the groups, so that cat puts the queries, the key and the value of a group next to each other.
    heads = [tensor.reshape(num_query_groups, -1, head_dim, *rest) for tensor in (query, key, value)]
    return torch.cat(heads, dim=1).reshape(-1, *rest)


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Split Megatron's linear_fc1 of a gated MLP into HF's gate and up; exact inverse of `merge_gate_up`.

    gate_up: [2*f, ...], the f rows that go through the activation first. Returns two contiguous views [f, ...].
    Raises ConversionError for an odd number of rows.
    Source: megatron.core MLP.forward, `x = torch.chunk(x, 2, dim=-1); return activation_func(x[0]) * x[1]`.
    """
    if gate_up.shape[0] % 2:
        raise ConversionError(
            f"gate_up: rows must be even, one half each for gate and up, got rows={gate_up.shape[0]}. "
            "Check ffn_hidden_size and swiglu."
        )
    # The first half is the one that the activation is applied to. Exchanged halves have the same shapes, so only a
    # comparison of values finds that mistake.
    gate, up = gate_up.chunk(2)
    return gate, up


def merge_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Fuse HF's gate and up [f, ...] into Megatron's linear_fc1 [2*f, ...]; exact inverse of `split_gate_up`.

    Raises ConversionError if the two differ in shape.
    """
    if gate.shape != up.shape:
        raise ConversionError(
            f"gate_up: gate and up must have one shape, got gate={tuple(gate.shape)}, up={tuple(up.shape)}. "
            "Check intermediate_size."
        )
    return torch.cat([gate, up])


# --- the layouts that rows name ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLayout:
    """A pair of exact inverses between one Megatron tensor and the HF tensors of its row."""

    split: Callable[[Tensor, ModelShape], tuple[Tensor, ...]]
    merge: Callable[[Sequence[Tensor], ModelShape], Tensor]


def _split_qkv(qkv: Tensor, model: ModelShape) -> tuple[Tensor, ...]:
    return split_qkv(qkv, num_query_groups=model.num_query_groups, head_dim=model.head_dim)


def _merge_qkv(parts: Sequence[Tensor], model: ModelShape) -> Tensor:
    query, key, value = parts
    return merge_qkv(query, key, value, num_query_groups=model.num_query_groups, head_dim=model.head_dim)


def _cut_qkv(qkv: Tensor, model: ModelShape) -> Sequence[Tensor]:
    key_values = model.num_query_groups * model.head_dim
    return qkv.split([model.num_attention_heads * model.head_dim, key_values, key_values])


def _split_to_neighbours(qkv: Tensor, model: ModelShape) -> tuple[Tensor, ...]:
    query, key, value = _split_qkv(qkv, model)
    heads, groups = model.num_attention_heads, model.num_query_groups
    return permute_rope(query, num_heads=heads), permute_rope(key, num_heads=groups), value


def _merge_neighbours(parts: Sequence[Tensor], model: ModelShape) -> Tensor:
    query, key, value = parts
    heads, groups = model.num_attention_heads, model.num_query_groups
    halves = (unpermute_rope(query, num_heads=heads), unpermute_rope(key, num_heads=groups), value)
    return _merge_qkv(halves, model)


# The functions get the model because some layouts depend on its number of heads.
AS_IS = TensorLayout(split=lambda tensor, _: (tensor,), merge=lambda parts, _: parts[0])
# GPT-2's Conv1D stores [in, out].
TRANSPOSED = TensorLayout(
    # contiguous: safetensors stores row after row, and a transposed view has its elements in the other order.
    split=lambda tensor, _: (tensor.t().contiguous(),),
    merge=lambda parts, _: parts[0].t().contiguous(),
)
QKV = TensorLayout(split=_split_qkv, merge=_merge_qkv)
# Phi-3's qkv_proj: all of q, then all of k, then all of v.
FUSED_QKV = TensorLayout(
    split=lambda tensor, model: (torch.cat(_split_qkv(tensor, model)),),
    merge=lambda parts, model: _merge_qkv(_cut_qkv(parts[0], model), model),
)
# Helium's q and k, which are turned by neighbouring rows.
NEIGHBOURS_QKV = TensorLayout(split=_split_to_neighbours, merge=_merge_neighbours)
# GPT-2's c_attn keeps q, k and v in one tensor, one after the other.
CONV1D_QKV_WEIGHT = TensorLayout(
    split=lambda tensor, model: (torch.cat(_split_qkv(tensor, model)).t().contiguous(),),
    merge=lambda parts, model: _merge_qkv(parts[0].t().chunk(3), model),
)
CONV1D_QKV_BIAS = TensorLayout(
    split=lambda tensor, model: (torch.cat(_split_qkv(tensor, model)),),
    merge=lambda parts, model: _merge_qkv(parts[0].chunk(3), model),
)
GATE_UP = TensorLayout(split=lambda tensor, _: split_gate_up(tensor), merge=lambda parts, _: merge_gate_up(*parts))
