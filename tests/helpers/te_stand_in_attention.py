"""Attention for tests/helpers/te_stand_in.py: cuDNN's fused attention, the softmaxes without it, rotary embeddings.

Computed in fp32 whatever the type of the tensors. Packed sequences, [t, h, d], are one row with a mask of their own.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.helpers.te_stand_in_quantize import DTYPES, refuse

# Attention that is not fused: megatron's fp32 runs take it, cuDNN has no fp32.


def scaled_upper_triang_masked_softmax_forward(x: Tensor, scale: float) -> Tensor:
    mask = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    return torch.softmax((x.float() * scale).masked_fill(mask, float("-inf")), -1).to(x.dtype)


def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax((x.float() * scale).masked_fill(mask.bool(), -10000.0), -1).to(x.dtype)


def scaled_aligned_causal_masked_softmax_forward(x: Tensor, scale: float) -> Tensor:
    rows, columns = x.shape[-2:]
    mask = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    return torch.softmax((x.float() * scale).masked_fill(mask, float("-inf")), -1).to(x.dtype)


def scaled_softmax_backward(grads: Tensor, results: Tensor, scale: float) -> Tensor:
    y, dy = results.float(), grads.float()
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(grads.dtype)


def get_fused_attn_backend(parameters: Any) -> tuple[int, str]:
    """cuDNN's attention takes 16-bit tensors with heads of multiples of 8; scores of fp8 are not pretended."""
    if DTYPES.get(int(parameters.qkv_dtype)) not in (torch.bfloat16, torch.float16):
        return 2, "only 16-bit tensors"
    return (2, "heads of a multiple of 8") if parameters.head_dim_qk % 8 else (0, "")


def find_sequence_dims(layout_or_format: Any) -> tuple[int, int]:
    """Where batch and sequence are in a tensor of this layout."""
    name = layout_or_format.name.split("_")[1]
    return {"BSHD": (0, 1), "SBHD": (1, 0), "THD": (0, 1)}.get(name) or refuse(f"fused attention of layout {name}")()


def to_heads_first(x: Tensor, dims: tuple[int, int]) -> Tensor:
    """[b, h, s, d] in fp32 of a tensor [b, s, h, d], [s, b, h, d], or [t, h, d] of one row."""
    x = x.unsqueeze(0) if x.dim() == 3 else x
    return x.float().permute(dims[0], 2, dims[1], 3)


def from_heads_first(x: Tensor, dims: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return x.permute(*((0, 2, 1, 3) if dims == (0, 1) else (2, 0, 1, 3))).to(dtype).contiguous()


def compute_scores(q: Tensor, k: Tensor, scale: float, mask_type: Any, window: Any, starts: Tensor | None) -> Tensor:
    """Masked scores [b, h, sq, skv] of heads-first tensors whose keys may have fewer heads.

    starts: where packed sequences begin, and the end of the last.
    """
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    if starts is not None:
        if mask_type.name != "NVTE_PADDING_CAUSAL_MASK" or window[0] != -1 or starts[-1] != q.shape[2]:
            refuse(f"fused attention of packed sequences with {mask_type.name}, {window} or padding")()
        sequence = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        is_hidden = (sequence[:, None] != sequence[None, :]) | torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(is_hidden, float("-inf"))
    if mask_type.name == "NVTE_NO_MASK" and tuple(window) == (-1, -1):
        return scores
    if "CAUSAL" not in mask_type.name or "PADDING" in mask_type.name or window[0] != -1:
        refuse(f"fused attention with {mask_type.name} and window {window}")()
    offset = scores.shape[-1] - scores.shape[-2] if "BOTTOM_RIGHT" in mask_type.name else 0
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(offset + 1), float("-inf"))


def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, set_zero: bool, layout: Any,
    o_format: Any, scale_format: Any, bias_type: Any, mask_type: Any, softmax_type: Any, window: Any,
    bottom_right: Any, cu_q: Tensor, cu_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """Output, logsumexp of the scores [b, h, s, 1] and the state of a generator; attention dropout is refused."""
    if dropout or bias_type or softmax_type:
        refuse("fused_attn_fwd with dropout, bias or another softmax")()
    dims, out_dims = find_sequence_dims(layout), find_sequence_dims(o_format)
    query, key, value = (to_heads_first(tensor, dims) for tensor in (q, k, v))
    scores = compute_scores(query, key, scale, mask_type, window, cu_q if q.dim() == 3 else None)
    groups = query.shape[1] // value.shape[1]
    output = torch.softmax(scores, -1) @ value.repeat_interleave(groups, 1)
    stats = scores.logsumexp(-1, keepdim=True)
    output = from_heads_first(output, out_dims, q.dtype)
    output = output.squeeze(0) if q.dim() == 3 else output
    return [output, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, set_zero: bool, layout: Any, o_format: Any,
    do_format: Any, dqkv_layout: Any, scale_format: Any, do_scale_format: Any, bias_type: Any, mask_type: Any,
    softmax_type: Any, window: Any, bottom_right: Any, deterministic: bool, cu_q: Tensor, cu_kv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, fake_dtype: Any, saved: list[Tensor], *rest: Any,
) -> list[Any]:  # fmt: skip
    """Gradients of q, k, v, from the output and the logsumexp, which context parallelism takes over all ranks."""
    dims = find_sequence_dims(layout)
    query, key, value = (to_heads_first(tensor, dims) for tensor in (q, k, v))
    output, grads = to_heads_first(o, find_sequence_dims(o_format)), to_heads_first(do, find_sequence_dims(do_format))
    groups = query.shape[1] // key.shape[1]
    starts = cu_q if q.dim() == 3 else None
    stats = saved[0].float().reshape(*query.shape[:3], 1)
    probabilities = torch.exp(compute_scores(query, key, scale, mask_type, window, starts) - stats)
    dvalue = probabilities.transpose(-1, -2) @ grads
    dprobabilities = grads @ value.repeat_interleave(groups, 1).transpose(-1, -2)
    dscores = probabilities * (dprobabilities - (grads * output).sum(-1, keepdim=True)) * scale
    dquery = dscores @ key.repeat_interleave(groups, 1)
    dkey = dscores.transpose(-1, -2) @ query
    shared = [x.unflatten(1, (-1, groups)).sum(2) for x in (dkey, dvalue)]
    grad_dims = find_sequence_dims(dqkv_layout)
    grads = (from_heads_first(x, grad_dims, q.dtype) for x in (dquery, *shared))
    return [*(grad.squeeze(0) if q.dim() == 3 else grad for grad in grads), None, None]


def rotate(x: Tensor, freqs: Tensor, qkv_format: Any, interleaved: bool, sign: int) -> Tensor:
    """Rotary embedding of the first freqs.shape[-1] numbers of each head; sign -1 is its transpose (the gradient)."""
    if interleaved:
        refuse("fused_rope with interleaved halves")()
    sequence_dim = find_sequence_dims(qkv_format)[1]
    angles = freqs[: x.shape[sequence_dim]].reshape(-1, freqs.shape[-1])
    angles = angles[:, None, None, :] if sequence_dim == 0 else angles[None, :, None, :]
    width = freqs.shape[-1]
    turned, kept = x.float()[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    cosine, sine = angles.cos(), angles.sin() * sign
    turned = turned * cosine + torch.cat((-second, first), -1) * sine
    return torch.cat((turned.to(x.dtype), kept), -1)


def fused_rope_forward(
    x: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool, cu: Any, cp_size: int, cp_rank: int
) -> Tensor:
    if starts is not None or cu is not None or cp_size != 1:
        refuse("fused_rope with start positions, packed sequences or context parallelism")()
    return rotate(x, freqs, qkv_format, interleaved, 1)


def fused_rope_backward(
    grads: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool, cu: Any, cp_size: int, cp_rank: int
) -> Tensor:
    return rotate(grads, freqs, qkv_format, interleaved, -1)


def fused_qkv_rope_forward(
    qkv: Tensor, q_freqs: Tensor, k_freqs: Tensor, starts: Any, widths: list[int], qkv_format: Any, interleaved: bool,
    cp_size: int, cp_rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key and value, each [s, b, heads, d], of the queries, key and value of each group, [s, b, g, widths]."""
    if starts is not None or cp_size != 1:
        refuse("fused_qkv_rope with start positions or context parallelism")()
    queries, key, value = qkv.split(list(widths), -1)
    query = queries.reshape(*qkv.shape[:2], -1, widths[1])
    query, key = (
        rotate(x, freqs, qkv_format, interleaved, 1) for x, freqs in zip((query, key), (q_freqs, k_freqs), strict=True)
    )
    return query, key, value.contiguous()


def fused_qkv_rope_backward(
    q_grads: Tensor, k_grads: Tensor, v_grads: Tensor, q_freqs: Tensor, k_freqs: Tensor, widths: list[int],
    qkv_format: Any, interleaved: bool, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    query = rotate(q_grads, q_freqs, qkv_format, interleaved, -1)
    key = rotate(k_grads, k_freqs, qkv_format, interleaved, -1)
    return torch.cat((query.reshape(*key.shape[:3], widths[0]), key, v_grads), -1)


def convert_thd_to_bshd(x: Tensor, starts: Tensor, batch: int, longest: int) -> Tensor:
    """Sequences of [t, h, d], which begin at `starts`, as rows [b, longest, h, d] that end with zeros."""
    rows = x.new_zeros(batch, longest, *x.shape[1:])
    for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        rows[row, : end - start] = x[start:end]
    return rows


def convert_bshd_to_thd(rows: Tensor, starts: Tensor, num_tokens: int) -> Tensor:
    x = rows.new_zeros(num_tokens, *rows.shape[2:])
    for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        x[start:end] = rows[row, : end - start]
    return x


def list_places_by_rank(starts: Tensor, cp_size: int) -> Tensor:
    """The places of packed sequences in the order of context-parallel ranks, which have two parts of each sequence."""
    places = []
    for rank in range(cp_size):
        for start, end in itertools.pairwise(starts.tolist()):
            size = (end - start) // (2 * cp_size)
            for part in (rank, 2 * cp_size - 1 - rank):
                places += range(start + part * size, start + (part + 1) * size)
    return torch.tensor(places)


def thd_sequence_order_to_cp_rank_order(x: Tensor, starts: Tensor, cp_size: int, num_tokens: int) -> Tensor:
    return x[list_places_by_rank(starts, cp_size)]


def thd_cp_rank_order_to_sequence_order(x: Tensor, starts: Tensor, cp_size: int, num_tokens: int) -> Tensor:
    return torch.empty_like(x).index_copy_(0, list_places_by_rank(starts, cp_size), x)


KERNELS = (
    thd_sequence_order_to_cp_rank_order, thd_cp_rank_order_to_sequence_order,
    convert_thd_to_bshd, convert_bshd_to_thd,
    scaled_softmax_forward, scaled_masked_softmax_forward, scaled_upper_triang_masked_softmax_forward,
    scaled_aligned_causal_masked_softmax_forward,
    scaled_softmax_backward, get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd, fused_rope_forward,
    fused_rope_backward, fused_qkv_rope_forward, fused_qkv_rope_backward,
)  # fmt: skip
# A mask has no gradient, so that the other softmaxes share one function.
ALIASES = {
    f"scaled_{kind}_softmax_backward": scaled_softmax_backward
    for kind in ("masked", "upper_triang_masked", "aligned_causal_masked")
}
