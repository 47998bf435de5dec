"""The product of 16-bit matrices onto an fp32 one, which PyTorch has on GPUs alone, for the CPU."""

from typing import Any

import torch


def add_product(
    self: torch.Tensor, one: torch.Tensor, other: torch.Tensor, dtype: Any, *, beta: Any = 1, alpha: Any = 1, out: Any
) -> torch.Tensor:
    """`aten::addmm.dtype_out` as cuBLAS computes it: exact products of 16-bit numbers, summed in fp32."""
    assert self.dtype == out.dtype == dtype == torch.float32
    product: torch.Tensor = out.copy_(beta * self + alpha * (one.float() @ other.float()))
    return product
