"""Weight gradients, gradient norm and clipping where neither TransformerEngine nor apex has a kernel for them.

Installed by `megatron_compat.install`. Weight gradients take the place of apex's module fused_weight_gradient_mlp_cuda,
so the two functions for them have its names; the others have the signatures of amp_C's functions over many tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, output_gradients: Tensor, main_grad: Tensor) -> None:
    """Add a linear layer's weight gradient to `main_grad` [o, i], fp32, in one matrix product.

    inputs [t, i] and output_gradients [t, o]: one dtype, 16-bit or fp32. The product is never a tensor of its own: the
    16-bit gradient, its reading and its addition are saved. torch multiplies 16-bit matrices onto an fp32 one only on
    a GPU, and since 2.11 (in 2.8 to 2.10 `self` had to be 16-bit too).
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(output_gradients.t(), inputs)
        return
    torch.addmm(main_grad, output_gradients.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def wgrad_gemm_accum_fp16(inputs: Tensor, output_gradients: Tensor, main_grad: Tensor) -> None:
    """The same onto a 16-bit `main_grad` (--grad-reduce-in-bf16), of the dtype of both factors."""
    main_grad.addmm_(output_gradients.t(), inputs)


def norm_of_all(
    chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, None]:
    """The L2 norm [1] of all tensors together, fp32, on their device: amp_C.multi_tensor_l2norm.

    Summed in fp64, so that the norm depends neither on the order of the summation nor on how weights are cut over
    ranks. In fp32, torch adds the squares of a CPU tensor one after the other and loses 4e-5 over a million elements.
    """
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def scale_all(chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[Tensor]], scale: float | Tensor) -> None:
    """Write the tensors of the first list times `scale` to those of the second: amp_C.multi_tensor_scale.

    scale: a number, or a tensor of one element on the device of the others, which is not read by the host.
    """
    sources, targets = (list(tensors) for tensors in tensor_lists)
    if not targets:
        return  # a rank none of whose parameters has a gradient; torch refuses an empty list
    factor = scale.reshape(()) if isinstance(scale, Tensor) else scale
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:  # megatron's copy between fp16 and fp32 weights: scale is 1
        torch._foreach_copy_(targets, sources if scale == 1 else torch._foreach_mul(sources, factor))
