"""The cross entropy of logits whose columns are split over tensor-parallel ranks, without a copy of them.

Megatron's loss casts the logits to fp32, which at a vocabulary of 100,000 takes as much memory as ten layers keep, and
passes over that copy eleven times. Here the forward pass reads the logits once and keeps two numbers for each row. The
backward pass reads them once more and writes their gradient over them, so nothing else may need them by then: the
output layer does not, and a second backward pass is refused.

The columns that pad the vocabulary for tensor parallelism stand for no token. Nothing depends on them, and their
gradient is 0, for three reasons. A continued run starts at the loss that transformers computes. The loss does not
depend on the padding, which grows with tensor parallelism. No gradient reaches the padding rows of the weight, so an
export may drop them. A run that was begun with Megatron's loss has learned low logits for these rows; it continues at
the same loss, less the small probability that they still have.

The work on rows is in cross_entropy_triton.py for GPUs and in cross_entropy_torch.py for CPUs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from megatron_hammer.model import cross_entropy_torch


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, num_tokens: int | None, group: ProcessGroup
) -> Tensor:
    """Loss [s, b] in fp32 of targets [s, b] under logits [s, b, p / tp], whose backward pass overwrites the logits.

    logits: this rank's equal part of the padded vocabulary, contiguous, of any floating type; arithmetic is in fp32.
    num_tokens: of the whole vocabulary without its padding; None counts the padding as tokens.
    A target outside the padded vocabulary, such as -100, has a finite loss that means nothing: its loss mask must be
    0, as with Megatron's loss. A target among the padding has a loss of about 1e38, or 1e4 in fp16, so it is noticed.
    """
    # megatron types it as a ProcessGroup, whose rank() is that within the group.
    width = logits.shape[-1]
    first_column = group.rank() * width
    num_columns = width if num_tokens is None else min(max(num_tokens - first_column, 0), width)
    loss: Tensor = _VocabParallelCrossEntropy.apply(logits, targets - first_column, num_columns, group)  # type: ignore[no-untyped-call]
    return loss


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """targets: relative to this rank's first column. num_columns: those of this rank that stand for tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, num_columns: int, group: ProcessGroup) -> Tensor:
        width = logits.shape[-1]
        rows, row_targets = logits.view(-1, width), targets.reshape(-1)
        own_maxima, sums, target_logits = _select_kernels(logits).reduce_rows(rows, row_targets, num_columns)
        maxima = own_maxima
        if group.size() > 1:
            maxima = own_maxima.clone()
            torch.distributed.all_reduce(maxima, op=ReduceOp.MAX, group=group)
            # A rank of padding alone has the maximum -inf and the sum 0, which stays 0.
            sums = sums * (own_maxima - maxima).exp()
        is_here = (row_targets >= 0) & (row_targets < num_columns)
        is_padding = (row_targets >= num_columns) & (row_targets < width)
        shifted = torch.where(is_here, target_logits - maxima, 0.0)
        shifted = shifted.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        if group.size() > 1:
            parts = torch.stack([sums, shifted])
            torch.distributed.all_reduce(parts, group=group)
            sums, shifted = parts.unbind()
        ctx.save_for_backward(logits, row_targets, maxima, sums)
        ctx.num_columns = num_columns
        # Two numbers and not their sum, log-sum-exp: at logits of 1e4, fp32 would give it to a thousandth.
        return (sums.log() - shifted).view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, row_targets, maxima, sums = ctx.saved_tensors
        # That of a sum is one number seen many times (stride 0), and the kernels step from element to element.
        scales = gradients[0].reshape(-1).to(maxima.dtype).contiguous()
        _select_kernels(logits).write_gradient(
            logits.view(-1, logits.shape[-1]), row_targets, ctx.num_columns, maxima, sums, scales
        )
        # What else saved the logits finds them changed, as after any in-place operation; Triton does not tell autograd.
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None


def _select_kernels(logits: Tensor) -> Any:
    """The module whose `reduce_rows` and `write_gradient` work where the logits are; Triton's have no fp64."""
    if logits.device.type != "cuda" or logits.dtype == torch.float64:
        return cross_entropy_torch
    # Not above: PyTorch without CUDA comes without Triton. preflight/platform.py asks for it.
    from megatron_hammer.model import cross_entropy_triton

    return cross_entropy_triton
