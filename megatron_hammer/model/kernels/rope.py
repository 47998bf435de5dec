"""Rotary embeddings as Triton kernels, with the split of linear_qkv's output into query, key and value.

They have the signatures of the TransformerEngine functions that megatron calls under `apply_rope_fusion` and
`fused_single_qkv_rope`. One program turns every head of one token. Sines and cosines are in fp32; megatron's unfused
code rounds them to the dtype of the activations. They are a table, which two small kernels of PyTorch make in each
call: within ours, every thread would compute those of its own elements, and take longer for that than for moving them.
The gradient is the turn back. Not here: packed sequences, and multi-latent attention, which megatron turns otherwise.
Importing this file needs triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    source,
    target,
    is_head,
    table,
    sines,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    is_interleaved: tl.constexpr,
    is_backward: tl.constexpr,
):
    """Turn the heads of one token. source, target: pointers [heads] to their first elements; table: to the token's
    cosines; sines: how far behind them its sines are.
    """
    num_pairs: tl.constexpr = rotary_dim // 2
    pair = tl.arange(0, triton.next_power_of_2(num_pairs))
    first = 2 * pair if is_interleaved else pair
    second = first + 1 if is_interleaved else first + num_pairs
    is_pair = pair < num_pairs
    cos = tl.load(table + pair, mask=is_pair, other=0.0)[None, :]
    sin = tl.load(table + sines + pair, mask=is_pair, other=0.0)[None, :]
    if is_backward:
        sin = -sin
    mask = is_head[:, None] & is_pair[None, :]
    x_1 = tl.load(source[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(source[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)
    y_1 = x_1 * cos - x_2 * sin
    y_2 = x_2 * cos + x_1 * sin
    tl.store(target[:, None] + first[None, :], y_1.to(target.dtype.element_ty), mask=mask)
    tl.store(target[:, None] + second[None, :], y_2.to(target.dtype.element_ty), mask=mask)
    if rotary_dim < head_dim:
        _copy(source + rotary_dim, target + rotary_dim, is_head, head_dim - rotary_dim)


@triton.jit
def _copy(source, target, is_head, width: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(width))
    mask = is_head[:, None] & (column < width)[None, :]
    value = tl.load(source[:, None] + column[None, :], mask=mask)
    tl.store(target[:, None] + column[None, :], value, mask=mask)


@triton.jit
def _rope_tensor(
    source,
    target,
    table,
    batch,
    source_strides,
    target_strides,
    table_strides,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    is_interleaved: tl.constexpr,
    is_backward: tl.constexpr,
):
    """Heads of one token of [s, b, n, d]; strides: those of s, b and n (for the table of s, b and sines)."""
    token = tl.program_id(0).to(tl.int64)  # 64 bits: a large micro-batch has more than 2**31 elements
    position, sequence = token // batch, token % batch
    head = tl.arange(0, triton.next_power_of_2(num_heads)).to(tl.int64)
    _turn(
        source + position * source_strides[0] + sequence * source_strides[1] + head * source_strides[2],
        target + position * target_strides[0] + sequence * target_strides[1] + head * target_strides[2],
        head < num_heads,
        table + position * table_strides[0] + sequence * table_strides[1],
        table_strides[2],
        head_dim,
        rotary_dim,
        is_interleaved,
        is_backward,
    )


@triton.jit
def _rope_qkv(
    mixed,
    query,
    key,
    value,
    query_table,
    key_table,
    batch,
    mixed_strides,
    query_strides,
    key_strides,
    value_strides,
    query_table_strides,
    key_table_strides,
    num_groups: tl.constexpr,
    heads_per_group: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    is_interleaved: tl.constexpr,
    is_backward: tl.constexpr,
):
    """One token of mixed [s, b, g, (n/g + 2) * d] to query, key and value [s, b, heads, d], or their gradients back."""
    token = tl.program_id(0).to(tl.int64)
    position, sequence = token // batch, token % batch
    num_heads: tl.constexpr = num_groups * heads_per_group
    head = tl.arange(0, triton.next_power_of_2(num_heads)).to(tl.int64)
    group = tl.arange(0, triton.next_power_of_2(num_groups)).to(tl.int64)
    mixed += position * mixed_strides[0] + sequence * mixed_strides[1]
    mixed_query = mixed + head // heads_per_group * mixed_strides[2] + head % heads_per_group * head_dim
    mixed_key = mixed + group * mixed_strides[2] + heads_per_group * head_dim
    mixed_value = mixed_key + head_dim
    query += position * query_strides[0] + sequence * query_strides[1] + head * query_strides[2]
    key += position * key_strides[0] + sequence * key_strides[1] + group * key_strides[2]
    value += position * value_strides[0] + sequence * value_strides[1] + group * value_strides[2]
    query_table += position * query_table_strides[0] + sequence * query_table_strides[1]
    key_table += position * key_table_strides[0] + sequence * key_table_strides[1]
    query_sines, key_sines = query_table_strides[2], key_table_strides[2]
    is_head, is_group = head < num_heads, group < num_groups
    if is_backward:
        _turn(query, mixed_query, is_head, query_table, query_sines, head_dim, rotary_dim, is_interleaved, True)
        _turn(key, mixed_key, is_group, key_table, key_sines, head_dim, rotary_dim, is_interleaved, True)
        _copy(value, mixed_value, is_group, head_dim)
    else:
        _turn(mixed_query, query, is_head, query_table, query_sines, head_dim, rotary_dim, is_interleaved, False)
        _turn(mixed_key, key, is_group, key_table, key_sines, head_dim, rotary_dim, is_interleaved, False)
        _copy(mixed_value, value, is_group, head_dim)


class _RotaryTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, frequencies: Tensor, is_interleaved: bool) -> Tensor:
        ctx.save_for_backward(frequencies)
        ctx.is_interleaved = is_interleaved
        return _launch_tensor(tensor, frequencies, is_interleaved, is_backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (frequencies,) = ctx.saved_tensors
        return _launch_tensor(gradients[0], frequencies, ctx.is_interleaved, is_backward=True), None, None


class _RotaryQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, query_frequencies: Tensor, key_frequencies: Tensor, head_dim: int, is_interleaved: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query_frequencies, key_frequencies)
        ctx.is_interleaved = is_interleaved
        sequence, batch, groups, width = mixed.shape
        heads = (width // head_dim - 2) * groups
        query, key, value = (mixed.new_empty(sequence, batch, n, head_dim) for n in (heads, groups, groups))
        frequencies = (query_frequencies, key_frequencies)
        _launch_qkv(_with_dense_rows(mixed), (query, key, value), frequencies, is_interleaved, is_backward=False)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = (_with_dense_rows(gradient) for gradient in gradients)
        sequence, batch, groups, head_dim = key.shape
        mixed = key.new_empty(sequence, batch, groups, (query.shape[2] // groups + 2) * head_dim)
        _launch_qkv(mixed, (query, key, value), ctx.saved_tensors, ctx.is_interleaved, is_backward=True)
        return mixed, None, None, None, None


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but of the last dimension; attention's backward pass gives permuted gradients."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _make_table(frequencies: Tensor, is_interleaved: bool) -> Tensor:
    """Cosines and sines [2, s, 1 or b, r / 2], fp32, of angles [s, 1 or b, 1, r].

    Every rotary embedding of megatron has one angle for both elements of a pair.
    """
    size = frequencies.shape[-1]
    angles = (frequencies[:, :, 0, ::2] if is_interleaved else frequencies[:, :, 0, : size // 2]).float()
    table = angles.new_empty(2, *angles.shape)
    torch.cos(angles, out=table[0])
    torch.sin(angles, out=table[1])
    return table


def _table_strides(table: Tensor) -> tuple[int, int, int]:
    """Strides of position, sequence and sines; the second is 0 where all sequences have the same angles."""
    return table.stride(1), table.stride(2) if table.shape[2] > 1 else 0, table.stride(0)


def _launch_tensor(tensor: Tensor, frequencies: Tensor, is_interleaved: bool, *, is_backward: bool) -> Tensor:
    tensor = _with_dense_rows(tensor)
    sequence, batch, heads, head_dim = tensor.shape
    table = _make_table(frequencies, is_interleaved)
    output = tensor.new_empty(tensor.shape)
    _rope_tensor[(sequence * batch,)](
        tensor,
        output,
        table,
        batch,
        tensor.stride()[:3],
        output.stride()[:3],
        _table_strides(table),
        num_heads=heads,
        head_dim=head_dim,
        rotary_dim=frequencies.shape[-1],
        is_interleaved=is_interleaved,
        is_backward=is_backward,
    )
    return output


def _launch_qkv(
    mixed: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    frequencies: Sequence[Tensor],
    is_interleaved: bool,
    *,
    is_backward: bool,
) -> None:
    query, key, _ = parts
    sequence, batch, heads, head_dim = query.shape
    query_table = _make_table(frequencies[0], is_interleaved)
    # megatron gives both the same angles, as one tensor.
    key_table = query_table if frequencies[1] is frequencies[0] else _make_table(frequencies[1], is_interleaved)
    _rope_qkv[(sequence * batch,)](
        mixed,
        *parts,
        query_table,
        key_table,
        batch,
        mixed.stride()[:3],
        *(part.stride()[:3] for part in parts),
        _table_strides(query_table),
        _table_strides(key_table),
        num_groups=key.shape[2],
        heads_per_group=heads // key.shape[2],
        head_dim=head_dim,
        rotary_dim=frequencies[0].shape[-1],
        is_interleaved=is_interleaved,
        is_backward=is_backward,
    )


def apply_rotary(tensor: Tensor, frequencies: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first r elements of every head of [s, b, n, d] by the angles [s, 1 or b, 1, r]; the others are copied.

    interleaved: the elements 2i and 2i + 1 are a pair, else i and i + r/2. Returns a contiguous tensor, same dtype.
    Takes the place of megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb.
    """
    output: Tensor = _RotaryTensor.apply(tensor, frequencies, interleaved)
    return output


def split_and_apply_rotary(
    mixed: Tensor, query_frequencies: Tensor, key_frequencies: Tensor, split_widths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [s, b, n, d], key and value [s, b, g, d] of linear_qkv's output [s, b, g, (n/g + 2) * d], the first two
    turned by their angles [s, 1 or b, 1, r].

    split_widths: of a group's queries, key and value, the last two d. All three are contiguous copies, so nothing holds
    on to `mixed`. Takes the place of transformer_engine.pytorch.attention.rope.apply_fused_qkv_rotary_pos_emb as
    megatron calls it: pairs are never interleaved.
    """
    _, head_dim, value_dim = split_widths
    if head_dim != value_dim or sum(split_widths) != mixed.shape[-1]:
        raise ValueError(f"split_widths: key and value must be equally wide, got {split_widths} of {mixed.shape[-1]}.")
    output: tuple[Tensor, Tensor, Tensor] = _RotaryQkv.apply(mixed, query_frequencies, key_frequencies, head_dim, False)
    return output
