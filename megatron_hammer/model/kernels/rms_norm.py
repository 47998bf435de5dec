"""RMSNorm whose input is the residual too, as Triton kernels.

The residual branches off before the norm, so the gradient of the norm's input and that of the residual are added: a
pass over three hidden states, which the backward kernel saves. Sums are fp32. Importing this file needs triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the backward pass, each of which sums the gradient of the weight over its rows: a multiple of the
# multiprocessors of a GPU (132 on H100), and few enough that adding up what they write is no work.
NUM_WEIGHT_SUMS = 528


@triton.jit
def _rms_norm_forward(source, weight, output, inverse_rms, width: tl.constexpr, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    mask = column < width
    x = tl.load(source + row * width + column, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, (x * factor * w).to(output.dtype.element_ty), mask=mask)
    tl.store(inverse_rms + row, factor)


@triton.jit
def _rms_norm_backward(
    source,
    weight,
    inverse_rms,
    gradient,
    residual_gradient,
    source_gradient,
    weight_sums,
    num_rows,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Rows p, p + P, p + 2P, ... of program p of P; its share of the weight's gradient is row p of weight_sums."""
    column = tl.arange(0, block)
    mask = column < width
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([block], dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * width  # 64 bits: a large micro-batch has more than 2**31 elements
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = tl.load(source + start + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gradient + start + column, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(residual_gradient + start + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(inverse_rms + row)
        normalized = x * factor
        scaled = g * w
        mean = tl.sum(scaled * normalized) / width
        output = r + factor * (scaled - normalized * mean)
        tl.store(source_gradient + start + column, output.to(source_gradient.dtype.element_ty), mask=mask)
        weight_sum += g * normalized
        start += tl.num_programs(0) * width
    tl.store(weight_sums + tl.program_id(0) * width + column, weight_sum, mask=mask)


class _NormWithResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        source = hidden.contiguous()
        width = source.shape[-1]
        output = torch.empty_like(source)
        inverse_rms = source.new_empty(source.numel() // width, dtype=torch.float32)
        _rms_norm_forward[(len(inverse_rms),)](
            source, weight, output, inverse_rms, width, eps, triton.next_power_of_2(width), num_warps=_warps(width)
        )
        ctx.save_for_backward(source, weight, inverse_rms)
        # A view, because autograd takes an input that comes back as an output for one that was changed in place.
        return output, hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        source, weight, inverse_rms = ctx.saved_tensors
        gradient, residual_gradient = (tensor.contiguous() for tensor in gradients)
        num_rows, width = len(inverse_rms), source.shape[-1]
        source_gradient = torch.empty_like(source)
        num_programs = min(num_rows, NUM_WEIGHT_SUMS)
        weight_sums = source.new_empty(num_programs, width, dtype=torch.float32)
        _rms_norm_backward[(num_programs,)](
            source,
            weight,
            inverse_rms,
            gradient,
            residual_gradient,
            source_gradient,
            weight_sums,
            num_rows,
            width,
            triton.next_power_of_2(width),
            num_warps=_warps(width),
        )
        return source_gradient, weight_sums.sum(0).to(weight.dtype), None


def _warps(width: int) -> int:
    """Warps of 32 threads for one row: 16 elements a thread and more, as far as a program may grow."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


class RmsNormWithResidual(torch.nn.RMSNorm):
    """torch.nn.RMSNorm of hidden states [..., h] that returns (the normalized ones, the input as the residual).

    megatron's TransformerLayer takes such a pair (`fused_residual_rmsnorm`). The weight has its usual name.
    """

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output: tuple[Tensor, Tensor] = _NormWithResidual.apply(hidden, self.weight, self.eps)
        return output
