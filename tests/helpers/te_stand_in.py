"""A stand-in for TransformerEngine's compiled modules, so that its Python runs where there is no GPU.

`install(wheel_dir)` makes `import transformer_engine` work with the unpacked wheel of tests/helpers/te_wheel.py and
the functions below: torch on the CPU, numerically right, without their speed. Only what the modules call that
megatron builds is here. Every other function of `transformer_engine_torch` raises an error with its name.

The order of arguments is that of transformer_engine/pytorch/csrc/extensions.h. Attention is in
te_stand_in_attention.py, quantized tensors are in te_stand_in_quantize.py. Call `install` after `pretend_gpus` and
before megatron is imported: both decide at import whether TransformerEngine is there.
"""

import enum
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import te_stand_in_attention, te_stand_in_quantize
from tests.helpers.te_stand_in_quantize import DTYPES, dequantize_for_gemm, quantize, refuse


def install(wheel_dir: Path) -> None:
    """Put TransformerEngine of an unpacked wheel on the path of this process, with this stand-in, for good."""
    # Without this variable transformer_engine.common loads the CUDA libraries as it is imported.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    sys.path.insert(0, str(wheel_dir))
    sys.modules["transformer_engine_torch"] = build_module()
    onnx = types.ModuleType("transformer_engine.pytorch.onnx_extensions")  # needs onnxscript, which nothing here does
    onnx.__getattr__ = refuse_missing  # type: ignore[method-assign]
    sys.modules[onnx.__name__] = onnx
    folder = wheel_dir / "transformer_engine"
    spec = importlib.util.spec_from_file_location(
        "transformer_engine", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = load_framework_extension
    spec.loader.exec_module(package)


def load_framework_extension(framework: str) -> None:
    """transformer_engine.common's function of this name, which would load a library."""
    if framework != "torch":
        raise ImportError(f"the stand-in has nothing for {framework}")


def build_module() -> types.ModuleType:
    """`transformer_engine_torch`: what this file and te_stand_in_quantize.py define, and errors for the rest."""
    module = types.ModuleType("transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(module, name, enum.IntEnum(name, members.split(), start=0, module=module.__name__))
    module.DType = enum.IntEnum("DType", DTYPE_NUMBERS, module=module.__name__)
    for kernel in (*KERNELS, *te_stand_in_attention.KERNELS, *te_stand_in_quantize.KERNELS):
        setattr(module, kernel.__name__, kernel)
    vars(module).update(te_stand_in_attention.ALIASES)
    for name in CLASSES:
        setattr(module, name, type(name, (), {"__init__": refuse(name)}))
    module.__getattr__ = refuse_missing  # type: ignore[method-assign]
    return module


def refuse_missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return refuse(name)


# Members in the order of the C++ enums: TransformerEngine's Python checks some of them.
ENUMS = {
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_QKV_Format": "NVTE_BSHD NVTE_SBHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD "
    "NVTE_BHSD NVTE_QKV_Format_NOT_SET",
    "NVTE_QKV_Layout": "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD "
    "NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D "
    "NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD "
    "NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD "
    "NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD "
    "NVTE_QKV_Layout_NOT_SET",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "CommOverlapType": "RS AG",
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT "
    "GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
}
DTYPE_NUMBERS = {
    "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}  # fmt: skip
CLASSES = ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "FP8TensorMeta")


def get_cublasLt_version() -> int:
    return 130200


def get_cudnn_version() -> int:
    return 91400


def get_num_cublas_streams() -> int:
    return 4


def cast(value: Tensor, dtype: Any, quantizer: Any = None) -> Any:
    """A result as a kernel returns it: quantized where a quantizer is given, else in dtype (an enum of theirs)."""
    value = value.to(DTYPES[int(dtype)] if dtype is not None and not isinstance(dtype, torch.dtype) else dtype)
    return value if quantizer is None else quantize(value, quantizer)


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """D = op(B) op(A), the row-major reading of cuBLAS's column-major D = op(A) op(B).

    With grad, bias only says that the sum of B over its rows is wanted (the bias gradient).
    """
    if gelu or comm_overlap is not None:
        refuse("generic_gemm with gelu or comm_overlap")()
    shape = B.size() if not transB else None
    a, b = dequantize_for_gemm(A, rowwise=transA), dequantize_for_gemm(B, rowwise=not transB)
    product = alpha * (b.t() if transB else b) @ (a.t() if transA else a)
    if bias is not None and not grad:
        product = product + bias.float()
    if shape is not None:
        product = product.reshape(*shape[:-1], product.shape[-1])
    bias_grad = b.sum(0).to(DTYPES[int(bias_type)]) if bias is not None and grad else None
    if D is None:
        dtype = output_dtype if output_dtype is not None else torch.bfloat16
        return cast(product, dtype, quantizer), bias_grad, None, None
    product = product.reshape(D.shape)
    D.copy_(D.float() + product if accumulate else product)
    return D, bias_grad, None, None


def te_general_grouped_gemm(
    A: list[Any], transA: bool, B: list[Any], transB: bool, D: list[Tensor], D_type: Any, m_splits: list[int],
    bias: list[Tensor], bias_type: Any, single_output: bool, pre_gelu_out: list[Tensor], grad: bool,
    workspace: Any, workspace_size: int, accumulate: bool, use_split_accumulator: bool, sm_count: int,
) -> list[Tensor]:  # fmt: skip
    """Many products; with single_output they are written one below the other into the only tensor of D."""
    outputs = list(D[0].split(list(m_splits))) if single_output else D
    for index, (a, b, output) in enumerate(zip(A, B, outputs, strict=True)):
        has_bias = bias[index].numel() > 0
        if b.numel() == 0 if isinstance(b, Tensor) else b.size().numel() == 0:
            if not accumulate and output.numel():
                output.zero_()
            if has_bias and grad:
                bias[index].zero_()
            continue
        arguments = (None, None, bias[index] if has_bias else None, bias_type, False, None, grad)
        _, bias_grad, _, _ = generic_gemm(
            a, transA, b, transB, output, *arguments, workspace, workspace_size, accumulate, use_split_accumulator
        )
        if bias_grad is not None:
            bias[index].copy_(bias_grad)
    return bias


def normalize_gradients(grads: Tensor, normalized: Tensor, rsigma: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of gamma for RMSNorm; LayerNorm subtracts one mean more."""
    scaled = grads * gamma
    dx = rsigma * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))
    return dx, (grads * normalized).sum(0)


def find_gamma(gamma: Tensor, zero_centered: bool) -> Tensor:
    return gamma.float() + 1 if zero_centered else gamma.float()


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    flat = x.float().reshape(-1, x.shape[-1])
    rsigma = torch.rsqrt(flat.square().mean(-1) + eps)
    output = flat * rsigma[:, None] * find_gamma(weight, zero_centered)
    return write_norm(output.reshape(x.shape), ln_out, quantizer, otype), None, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    flat, grads = (tensor.float().reshape(-1, x.shape[-1]) for tensor in (x, dz))
    factor = rsigma[:, None]
    dx, dgamma = normalize_gradients(grads, flat * factor, factor, find_gamma(gamma, zero_centered))
    return dx.reshape(x.shape).to(x.dtype), dgamma.to(gamma.dtype)


def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    dx, dgamma = rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered)
    return dx + add, dgamma


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, ln_out: Any, quantizer: Any, otype: Any,
    sm_margin: int, zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    flat = x.float().reshape(-1, x.shape[-1])
    mu = flat.mean(-1)
    rsigma = torch.rsqrt(flat.var(-1, correction=0) + eps)
    output = (flat - mu[:, None]) * rsigma[:, None] * find_gamma(weight, zero_centered)
    if bias is not None:
        output = output + bias.float()
    return write_norm(output.reshape(x.shape), ln_out, quantizer, otype), mu, rsigma


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    flat, grads = (tensor.float().reshape(-1, x.shape[-1]) for tensor in (x, dz))
    factor, scale = rsigma[:, None], find_gamma(gamma, zero_centered)
    dx, dgamma = normalize_gradients(grads, (flat - mu[:, None]) * factor, factor, scale)
    dx = dx - factor * (grads * scale).mean(-1, keepdim=True)
    return dx.reshape(x.shape).to(x.dtype), dgamma.to(gamma.dtype), grads.sum(0).to(gamma.dtype)


def write_norm(output: Tensor, ln_out: Any, quantizer: Any, otype: Any) -> Any:
    if ln_out is None:
        return cast(output, otype, quantizer)
    ln_out.copy_(output)
    return ln_out


def swiglu(x: Tensor, quantizer: Any) -> Any:
    gate, value = x.float().chunk(2, -1)
    return cast(torch.nn.functional.silu(gate) * value, x.dtype, quantizer)


def dswiglu(grad: Tensor, x: Tensor, quantizer: Any) -> Any:
    gate, value = x.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    grads = grad.float()
    dgate = grads * value * sigmoid * (1 + gate * (1 - sigmoid))
    return cast(torch.cat((dgate, grads * gate * sigmoid), -1), x.dtype, quantizer)


def gelu(x: Tensor, quantizer: Any) -> Any:
    return cast(torch.nn.functional.gelu(x.float(), approximate="tanh"), x.dtype, quantizer)


def dgelu(grad: Tensor, x: Tensor, quantizer: Any) -> Any:
    return cast(torch.ops.aten.gelu_backward(grad.float(), x.float(), approximate="tanh"), x.dtype, quantizer)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def fused_multi_row_padding(source: Tensor, output: Tensor, rows: list[int], padded_rows: list[int]) -> None:
    copy_rows(source, rows, output, padded_rows)


def fused_multi_row_unpadding(source: Tensor, output: Tensor, padded_rows: list[int], rows: list[int]) -> None:
    copy_rows(source, padded_rows, output, rows)


def copy_rows(source: Tensor, source_rows: list[int], output: Tensor, output_rows: list[int]) -> None:
    for block, target in zip(source.split(source_rows), output.split(output_rows), strict=True):
        target.zero_()
        count = min(len(block), len(target))
        target[:count] = block[:count]


# Kernels over lists of tensors: chunk_size and the flag of an overflow come first.


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)
        if not torch.isfinite(target).all():
            noop_flag.fill_(1)


def multi_tensor_scale_tensor(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: Tensor) -> None:
    multi_tensor_scale(chunk_size, noop_flag, lists, float(scale))


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Adam (mode 0) or AdamW (mode 1) over [grads, params, exp_avgs, exp_avg_sqs] and, where given, fp32 masters."""
    if int(noop_flag):
        return
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    grads, parameters, *_ = lists
    masters = lists[4] if len(lists) > 4 else parameters
    for grad, parameter, mean, square, master in zip(grads, parameters, lists[2], lists[3], masters, strict=True):
        value, slope = master.float(), grad.float()
        if mode == 0:
            slope = slope + weight_decay * value
        mean.copy_(beta1 * mean.float() + (1 - beta1) * slope)
        square.copy_(beta2 * square.float() + (1 - beta2) * slope.square())
        update = mean.float() / correction1 / ((square.float() / correction2).sqrt() + eps)
        if mode == 1:
            update = update + weight_decay * value
        master.copy_(value - lr * update)
        if parameter is not master:
            parameter.copy_(master)


def multi_tensor_adam_param_remainder(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], *hyperparameters: Any
) -> None:
    """Adam over [grads, bf16 params, exp_avgs, exp_avg_sqs, int16 remainders]: the fp32 value of a parameter is its
    bits, less 1 where the remainder is negative (it was rounded up), followed by the remainder's.
    """
    grads, parameters, means, squares, remainders = lists
    masters = []
    for parameter, remainder in zip(parameters, remainders, strict=True):
        low = remainder.int()
        high = parameter.view(torch.int16).int() - (low < 0).int()
        masters.append(((high << 16) | (low & 0xFFFF)).view(torch.float32))
    multi_tensor_adam(chunk_size, noop_flag, [grads, masters, means, squares], *hyperparameters)
    for parameter, remainder, master in zip(parameters, remainders, masters, strict=True):
        bits = master.view(torch.int32)
        remainder.copy_((bits << 16) >> 16)
        parameter.view(torch.int16).copy_((bits >> 16) + (remainder < 0).int())


KERNELS = (
    get_cublasLt_version, get_cudnn_version, get_num_cublas_streams, generic_gemm, te_general_grouped_gemm,
    rmsnorm_fwd, rmsnorm_bwd, rmsnorm_bwd_add, layernorm_fwd, layernorm_bwd, swiglu, dswiglu, gelu, dgelu,
    swap_first_dims, fused_multi_row_padding, fused_multi_row_unpadding, multi_tensor_scale, multi_tensor_scale_tensor,
    multi_tensor_l2norm, multi_tensor_adam, multi_tensor_adam_param_remainder,
)  # fmt: skip
