"""Quantized tensors for tests/helpers/te_stand_in.py: fp8 with one scale per tensor, per block, or mxfp8.

Values are rounded to fp8 as torch rounds them, and products are computed in fp32 from the rounded values. Data and
scales have the shapes of TransformerEngine's own containers, because its Python gathers and slices them. What differs
is the order of mxfp8's scales: a GPU kernel needs them permuted ("swizzled"), here they stay in the order of the
blocks whatever their flag says. nvfp4 is not here.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

# TransformerEngine's enum of types; it stores fp8 numbers as bytes.
DTYPES = {
    0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16, 7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}  # fmt: skip
MXFP8_BLOCK = 32
BLOCK = 128


class UnsupportedKernelError(NotImplementedError):
    """A kernel of TransformerEngine that has no stand-in was called."""


def refuse(name: str) -> Any:
    def raise_error(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedKernelError(f"transformer_engine_torch.{name} has no stand-in in tests/helpers/te_stand_in.py")

    return raise_error


def classes_of(kind: str) -> tuple[type, ...]:
    """Quantizers or storages of a kind; imported late, since TransformerEngine imports the stand-in first."""
    module = importlib.import_module("transformer_engine.pytorch")
    names = {
        "delayed quantizer": ("Float8Quantizer",),
        "tensor quantizer": ("Float8Quantizer", "Float8CurrentScalingQuantizer"),
        "mxfp8 quantizer": ("MXFP8Quantizer",),
        "block quantizer": ("Float8BlockQuantizer",),
        "tensor": ("Float8TensorStorage",),
        "mxfp8": ("MXFP8TensorStorage",),
        "block": ("Float8BlockwiseQTensorStorage",),
    }[kind]
    return tuple(getattr(module, name) for name in names)


def create_empty_quantized_tensor(quantizer: Any, shape: list[int], dtype: Any, device: Any, pin_memory: bool) -> Any:
    if isinstance(quantizer, classes_of("delayed quantizer")):
        tensors = allocate_tensor_scaled(quantizer, tuple(shape), scale_inv=1 / quantizer.scale.reshape(1))
        class_names = ("Float8TensorStorage", "Float8Tensor")
        cls = getattr(importlib.import_module("transformer_engine.pytorch"), class_names[not quantizer.internal])
        keywords = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "fake_dtype": dtype}
    else:
        tensors = quantizer.alloc_tensors(shape, device="cpu")
        metadata = quantizer.storage_metadata(dtype)
        cls, keywords = metadata["cls"], metadata["nontensor_kwargs"]
    for attribute, argument in cls._INNER_TENSORS:
        keywords[argument] = tensors.get(attribute)
    if not quantizer.internal:
        keywords |= {"shape": tuple(shape), "dtype": dtype, "requires_grad": False, "device": torch.device("cpu")}
        keywords.pop("fake_dtype")
    return cls(**keywords)


def allocate_tensor_scaled(quantizer: Any, shape: tuple[int, ...], *, scale_inv: Tensor) -> dict[str, Tensor]:
    utils = importlib.import_module("transformer_engine.pytorch.utils")
    has_one_buffer = utils.is_non_tn_fp8_gemm_supported()  # Blackwell multiplies without a transposed copy
    tensors = {"_scale_inv": scale_inv.clone()}
    if quantizer.rowwise_usage or has_one_buffer:
        tensors["_data"] = torch.empty(shape, dtype=torch.uint8)
    if quantizer.columnwise_usage and not has_one_buffer:
        tensors["_transpose"] = torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8)
    return tensors


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """The tensor as quantizer stores it, written into output where that is given; noop [1] other than 0 skips it."""
    if noop is not None and int(noop):
        return output
    if output is None:
        output = create_empty_quantized_tensor(quantizer, list(tensor.shape), tensor.dtype, "cpu", False)
    values = tensor.detach().float().reshape(-1, tensor.shape[-1])
    if values.numel() == 0:
        return output
    if isinstance(quantizer, classes_of("tensor quantizer")):
        write_tensor_scaled(values, quantizer, output)
    elif isinstance(quantizer, classes_of("mxfp8 quantizer")):
        write_mxfp8(values, quantizer, output)
    elif isinstance(quantizer, classes_of("block quantizer")):
        write_block_scaled(values, quantizer, output)
    else:
        refuse(f"quantize with {type(quantizer).__name__}")()
    return output


def write_tensor_scaled(values: Tensor, quantizer: Any, output: Any) -> None:
    amax = values.abs().amax()
    if isinstance(quantizer, classes_of("delayed quantizer")):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(())
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = find_scales(amax, quantizer)
    data = to_bytes(values * scale, quantizer)
    output._scale_inv.copy_((1 / scale).reshape(output._scale_inv.shape))
    if output._data is not None:
        output._data.copy_(data.reshape(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(data.t().reshape(output._transpose.shape))
        output._transpose_invalid = False


def write_mxfp8(values: Tensor, quantizer: Any, output: Any) -> None:
    """One power of two for 32 numbers of a row (rowwise) and of a column (columnwise), stored as its exponent."""
    for side, block in (("rowwise", (1, MXFP8_BLOCK)), ("columnwise", (MXFP8_BLOCK, 1))):
        data, scale_inv = getattr(output, f"_{side}_data"), getattr(output, f"_{side}_scale_inv")
        if data is None:
            continue
        largest = torch.finfo(DTYPES[int(quantizer.dtype)]).max
        amaxes = find_block_amaxes(values, block)
        exponents = (amaxes / largest).clamp(min=2.0**-127).log2().ceil()
        scales = expand(2.0**-exponents, block, values.shape)
        data.copy_(to_bytes(values * scales, quantizer).reshape(data.shape))
        put_corner(scale_inv, (exponents + 127).to(torch.uint8))


def write_block_scaled(values: Tensor, quantizer: Any, output: Any) -> None:
    """One scale for 1 x 128 or 128 x 128 numbers; columnwise data is stored transposed."""
    is_square = quantizer.block_scaling_dim == 2
    short = BLOCK if is_square else 1
    for side, block in (("rowwise", (short, BLOCK)), ("columnwise", (BLOCK, short))):
        data, scale_inv = getattr(output, f"_{side}_data"), getattr(output, f"_{side}_scale_inv")
        if data is None:
            continue
        scales = find_scales(find_block_amaxes(values, block), quantizer)
        rounded = to_bytes(values * expand(scales, block, values.shape), quantizer)
        data.copy_((rounded.t() if side == "columnwise" else rounded).reshape(data.shape))
        put_corner(scale_inv, (1 / scales).t() if is_block_scale_transposed(side, is_square) else 1 / scales)


def is_block_scale_transposed(side: str, is_square: bool) -> bool:
    """1 x 128: rowwise scales are [blocks, rows]. 128 x 128: columnwise scales are transposed as their data are."""
    return (side == "columnwise") == is_square


def find_scales(amaxes: Tensor, quantizer: Any) -> Tensor:
    """The factors that bring the largest value to fp8's largest; 1 where all values are 0 or one is infinite."""
    largest = torch.finfo(DTYPES[int(quantizer.dtype)]).max
    amaxes = amaxes.clamp(min=quantizer.amax_epsilon)
    scales = (largest / amaxes).clamp(max=torch.finfo(torch.float32).max)
    if quantizer.force_pow_2_scales:
        scales = 2.0 ** scales.log2().floor()
    return torch.where((amaxes > 0) & torch.isfinite(amaxes), scales, 1.0)


def find_block_amaxes(values: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).amax((1, 3))


def expand(scales: Tensor, block: tuple[int, int], shape: Any) -> Tensor:
    """One scale for each number of a matrix of this shape."""
    full = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[: shape[0], : shape[1]]


def put_corner(target: Tensor, values: Tensor) -> None:
    """Scales of GPU kernels are padded; the rest is 0."""
    target.zero_()
    target[: values.shape[0], : values.shape[1]] = values


def to_bytes(scaled: Tensor, quantizer: Any) -> Tensor:
    dtype = DTYPES[int(quantizer.dtype)]
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype).view(torch.uint8)


def dequantize_for_gemm(tensor: Any, *, rowwise: bool) -> Tensor:
    """The matrix [rows, columns] in fp32 from that copy of the data which a product along its rows or columns reads."""
    if isinstance(tensor, classes_of("tensor")):
        dtype = DTYPES[int(tensor._fp8_dtype)]
        if tensor._data is not None:
            values = tensor._data.reshape(-1, tensor._data.shape[-1]).view(dtype).float()
        else:
            values = tensor._transpose.reshape(tensor._transpose.shape[0], -1).view(dtype).float().t()
        return values * tensor._scale_inv.float()
    if isinstance(tensor, classes_of("mxfp8")):
        side, block = ("rowwise", (1, MXFP8_BLOCK)) if rowwise else ("columnwise", (MXFP8_BLOCK, 1))
        data, scale_inv = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv")
        values = data.reshape(-1, data.shape[-1]).view(DTYPES[int(tensor._fp8_dtype)]).float()
        return values * expand(2.0 ** (scale_inv.float() - 127), block, values.shape)
    if isinstance(tensor, classes_of("block")):
        return dequantize_blocks(tensor, rowwise=rowwise)
    if isinstance(tensor, Tensor) and type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.detach().float().reshape(-1, tensor.shape[-1])
    return refuse(f"generic_gemm of {type(tensor).__name__}")()


def dequantize_blocks(tensor: Any, *, rowwise: bool) -> Tensor:
    side = "rowwise" if rowwise else "columnwise"
    data, scale_inv = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv")
    dtype, is_square = DTYPES[int(tensor._fp8_dtype)], tensor._is_2D_scaled
    if rowwise:
        values = data.reshape(-1, data.shape[-1]).view(dtype).float()
    else:
        values = data.reshape(data.shape[0], -1).view(dtype).float().t()
    if is_block_scale_transposed(side, is_square):
        scale_inv = scale_inv.t()
    block = (BLOCK if is_square or not rowwise else 1, BLOCK if is_square or rowwise else 1)
    return values * expand(scale_inv, block, values.shape)


def dequantize(tensor: Any, otype: Any) -> Tensor:
    has_rows = getattr(tensor, "_rowwise_data", None) is not None
    return dequantize_for_gemm(tensor, rowwise=has_rows).reshape(tensor.size()).to(DTYPES[int(otype)])


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """[k, leading...] of bytes [leading..., k]."""
    transposed = data.reshape(-1, data.shape[-1]).t().contiguous().reshape(data.shape[-1], *data.shape[:-1])
    return transposed if out is None else out.copy_(transposed)


def bgrad_quantize(grads: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    bias_grad = grads.float().reshape(-1, grads.shape[-1]).sum(0).to(grads.dtype)
    return bias_grad, quantize(grads, quantizer)


def split_quantize(
    tensor: Tensor, sections: list[int], quantizers: list[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    flat = tensor.reshape(-1, tensor.shape[-1])
    return [quantize(part, quantizer) for part, quantizer in zip(flat.split(list(sections)), quantizers, strict=True)]


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    amax.copy_(tensor.float().abs().amax().reshape(amax.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], largest: float, force_pow_2: bool, epsilon: float
) -> None:
    for amax, scale, scale_inv in zip(*lists, strict=True):
        value = largest / amax.clamp(min=epsilon)
        value = 2.0 ** value.log2().floor() if force_pow_2 else value
        value = torch.where((amax > 0) & torch.isfinite(amax), value, 1.0)
        scale.copy_(value)
        scale_inv.copy_(1 / value)


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Delayed scaling: put the newest amaxes into the histories [length, tensors] and renew the scales."""
    largest = torch.finfo(DTYPES[int(dtype)]).max * 2.0**-margin
    newest = amaxes.split([history.shape[1] for history in histories])
    for history, scale, last in zip(histories, scales, newest, strict=True):
        history[0] = last
        amax = history[0].clone() if algorithm == "most_recent" else history.amax(0)
        history.copy_(history.roll(-1, 0))
        history[0] = 0
        renewed = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), renewed, scale))


KERNELS = (
    create_empty_quantized_tensor, quantize, dequantize, fp8_transpose, bgrad_quantize, split_quantize, compute_amax,
    multi_tensor_compute_scale_and_scale_inv, fused_amax_and_scale_update_after_reduction,
)  # fmt: skip
