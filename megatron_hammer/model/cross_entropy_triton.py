"""The work of cross_entropy.py on rows of logits as two Triton kernels: one reads each logit, one replaces it.

Both are bound by memory: 2 bytes per 16-bit logit forward, 4 backward. A program takes a row. It must know the row's
maximum before it can add up exponentials, so it keeps both while it goes over the row and corrects the sum whenever the
maximum grows (Milakov and Gimelshein 2018, arXiv 1805.02867). Arithmetic is in fp32.

tests/numerics/test_cross_entropy.py runs them in Triton's interpreter, on a machine without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 columns for each of the 512 threads of a program: two loads of 16 bytes of 16-bit logits. Not tuned on a GPU.
MAX_BLOCK = 8192
NUM_WARPS = 16


def reduce_rows(rows: Tensor, targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and target logit [n] in fp32 of rows [n, c]; see cross_entropy.py."""
    maxima = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    sums, target_logits = torch.empty_like(maxima), torch.empty_like(maxima)
    _reduce_row[(len(rows),)](
        rows, targets, maxima, sums, target_logits, rows.stride(0), rows.shape[1], num_columns,
        BLOCK=_select_block(rows), num_warps=NUM_WARPS,
    )  # fmt: skip
    return maxima, sums, target_logits


def write_gradient(
    rows: Tensor, targets: Tensor, num_columns: int, maxima: Tensor, sums: Tensor, scales: Tensor
) -> None:
    """Overwrite rows [n, c] with their gradient; see cross_entropy.py."""
    _write_row_gradient[(len(rows),)](
        rows, targets, maxima, sums, scales, rows.stride(0), rows.shape[1], num_columns,
        BLOCK=_select_block(rows), num_warps=NUM_WARPS,
    )  # fmt: skip


def _select_block(rows: Tensor) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(rows.shape[1]))


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_row(  # type: ignore[no-untyped-def]
    logits, targets, maxima, sums, target_logits, stride, width, num_columns, BLOCK: tl.constexpr
):
    # int64: 16,384 rows of 105,792 columns are already more elements than int32 can count.
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        # Masked by the width, a multiple of 16: with a mask that may end anywhere, each logit would be loaded alone.
        block = tl.load(first + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        block = tl.where(columns < num_columns, block, float("-inf"))
        higher = tl.maximum(maximum, tl.max(block, 0))
        # As long as there is nothing but -inf, -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(block - shift), 0)
        maximum = higher
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < num_columns)
    target_logit = tl.load(first + target, mask=is_here, other=0.0).to(tl.float32)
    tl.store(maxima + row, maximum)
    tl.store(sums + row, total)
    tl.store(target_logits + row, target_logit)


@triton.jit  # type: ignore[untyped-decorator]
def _write_row_gradient(  # type: ignore[no-untyped-def]
    logits, targets, maxima, sums, scales, stride, width, num_columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * stride
    maximum = tl.load(maxima + row)
    scale = tl.load(scales + row)
    target = tl.load(targets + row)
    factor = scale / tl.load(sums + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_token = columns < num_columns
        block = tl.load(first + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(block - maximum) * factor
        gradient = tl.where(columns == target, gradient - scale, gradient)
        # The padding may hold anything, and a target may lie there.
        gradient = tl.where(is_token, gradient, 0.0)
        tl.store(first + columns, gradient.to(logits.dtype.element_ty), mask=columns < width)
