"""Writes a GGUF file tensor by tensor, and reads it back against the tensors that it was made from.

The `gguf` package writes the header; its own writing of tensors wants each whole and converted in memory, so the data
goes to the file in blocks of rows here. Format: header, key-value pairs, tensor infos, then the data of each tensor at
the next multiple of the alignment. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from megatron_hammer.checkpoint.gguf.file_types import FLOAT_DTYPES, decode_rows, encode_rows
from megatron_hammer.checkpoint.gguf.tensors import GgufTensor
from megatron_hammer.errors import ConversionError

BLOCK_BYTES = 1 << 25  # of rows as f32
NUM_SAMPLED_ROWS = 512
# (2 - 2**-10) * 2**15: 10 bits of mantissa, and 15 is the largest exponent of a finite value.
LARGEST_F16 = 65_504
# Largest relative error (rms) of the values read back: three times what each type has on normally distributed weights,
# and below sqrt(2), which rows in a wrong order have. Measured in test_gguf_file.py and test_gguf_vs_llama_cpp.py.
MAX_RELATIVE_ERROR: Mapping[GGMLQuantizationType, float] = {
    GGMLQuantizationType.Q8_0: 0.016,
    GGMLQuantizationType.Q4_0: 0.26,
    GGMLQuantizationType.Q5_0: 0.13,
    GGMLQuantizationType.Q5_1: 0.12,
    GGMLQuantizationType.Q2_K: 0.90,
    GGMLQuantizationType.Q3_K: 0.46,
    GGMLQuantizationType.Q4_K: 0.22,
    GGMLQuantizationType.Q5_K: 0.11,
    GGMLQuantizationType.Q6_K: 0.054,
}

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtraTensor:
    """A small f32 tensor that llama.cpp wants and transformers computes."""

    name: str
    values: Tensor


def write_gguf(
    path: Path,
    writer: GGUFWriter,
    extras: Sequence[ExtraTensor],
    tensors: Sequence[GgufTensor],
    read: ReadTensor,
    on_tensor: Callable[[int], None],
) -> None:
    """Write `path` whole: the header of `writer`, which has its key-value pairs, then every tensor of `read(hf_name)`.

    Memory: one stored tensor and a block of its rows. Raises ConversionError naming every tensor with NaN or infinity.
    """
    for extra in extras:
        shape, num_bytes = extra.values.shape, extra.values.numel() * 4
        writer.add_tensor_info(extra.name, shape, np.dtype(np.float32), num_bytes, GGMLQuantizationType.F32)
    for tensor in tensors:
        # float32 whatever the type is: for uint8 the package would take the shape for one in bytes and convert it. It
        # writes the type of the last argument.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Until it is closed, a part of the header may be in the package's buffer, and the data below would come before it.
    writer.close()
    not_finite: list[str] = []
    # The package has computed the offsets from num_bytes and the order above, so the data must follow in that order.
    with path.open("ab") as file:
        for extra in extras:
            _pad(file)
            file.write(encode_rows(extra.values, GGMLQuantizationType.F32))
        for number, tensor in enumerate(tensors, start=1):
            if not _write_tensor(file, tensor, read(tensor.hf_name)):
                not_finite.append(tensor.hf_name)
            on_tensor(number)
        _pad(file)
    # Raised after the last tensor, so that one run names all of them.
    if not_finite:
        kinds = {tensor.hf_name: tensor.type.name.lower() for tensor in tensors}
        raise ConversionError(
            *(
                f"{name}: weights must be finite in {kinds[name]}, got NaN or infinity. Export an earlier iteration"
                + (f", or pass --type bf16: f16 ends at {LARGEST_F16:,}." if kinds[name] == "f16" else ".")
                for name in not_finite
            )
        )


def _write_tensor(file: BinaryIO, tensor: GgufTensor, stored: Tensor) -> bool:
    """Returns whether every value is finite in the tensor's type."""
    dtype = FLOAT_DTYPES.get(tensor.type, torch.float32)
    is_finite = True
    # Before the split: the order of q and k rows changes within whole heads, and a block of rows may cut a head.
    arranged = tensor.arrange(stored)
    _pad(file)
    for rows in arranged.split(count_block_rows(arranged)):
        # After the conversion: a finite value above LARGEST_F16 becomes infinity in f16.
        is_finite = is_finite and bool(torch.isfinite(rows.to(dtype)).all())
        if is_finite:  # else the file is removed, and quantizing NaN has no meaning
            file.write(encode_rows(rows, tensor.type))
    return is_finite


def count_block_rows(tensor: Tensor) -> int:
    """How many rows are converted at a time."""
    return max(1, BLOCK_BYTES // (4 * max(1, tensor[:1].numel())))  # at least one row, however long it is


def _pad(file: BinaryIO) -> None:
    """Zeros to the next multiple of GGUF's alignment."""
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def verify_gguf(
    path: Path,
    extras: Sequence[ExtraTensor],
    tensors: Sequence[GgufTensor],
    read: ReadTensor,
    on_tensor: Callable[[int], None],
) -> None:
    """Read every tensor back: floats must be their source exactly, in its own order; quantized ones near it.

    Raises ConversionError naming every tensor that is not, or if other tensors are in the file.
    """
    stored = {entry.name: entry for entry in GGUFReader(path).tensors}
    expected = {extra.name for extra in extras} | {tensor.name for tensor in tensors}
    # Both ways: a tensor that is missing, and one that no plan has.
    wrong = sorted(expected ^ stored.keys())
    wrong += [
        extra.name
        for extra in extras
        if extra.name in stored and not np.array_equal(stored[extra.name].data, extra.values.numpy())
    ]
    for number, tensor in enumerate(tensors, start=1):
        if tensor.name in stored and not _is_read_back(stored[tensor.name].data, tensor, read(tensor.hf_name)):
            wrong.append(tensor.name)
        on_tensor(number)
    if wrong:
        raise ConversionError(
            *(
                f"{path}: {name} must read back as it was written, got a difference. "
                "Check the disk; if it is sound, this is a defect of the converter."
                for name in wrong
            )
        )


def _is_read_back(data: np.ndarray, tensor: GgufTensor, source: Tensor) -> bool:
    if tensor.type not in FLOAT_DTYPES:
        return measure_relative_error(data, tensor, source) <= MAX_RELATIVE_ERROR[tensor.type]
    dtype = FLOAT_DTYPES[tensor.type]
    # The file's rows are put back in the source's order, so that an error in the permutation cannot hide: arranging the
    # source once more would repeat it.
    if tensor.rope_heads is not None:
        return torch.equal(tensor.restore(_as_tensor(data, tensor, dtype)), source.to(dtype))
    rows_in_block = count_block_rows(source)
    return all(
        torch.equal(_as_tensor(data[begin : begin + rows_in_block], tensor, dtype), block.to(dtype))
        for begin, block in zip(range(0, len(source), rows_in_block), source.split(rows_in_block), strict=True)
    )


def _as_tensor(data: np.ndarray, tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a float tensor, copied from the file."""
    return torch.from_numpy(np.array(data).reshape(-1).view(np.uint8)).view(dtype).reshape(-1, *tensor.shape[1:])


def measure_relative_error(data: np.ndarray, tensor: GgufTensor, source: Tensor) -> float:
    """rms of the difference over rms of the source, on rows evenly spread over a quantized tensor."""
    step = max(1, tensor.shape[0] // NUM_SAMPLED_ROWS)
    written = decode_rows(np.ascontiguousarray(data[::step]), tensor.type)
    # The source is arranged here, not the file's rows restored: only every step-th row is decoded.
    expected = tensor.arrange(source)[::step].float()
    scale = expected.square().mean().sqrt().item()
    error = (written - expected).square().mean().sqrt().item()
    # A tensor of zeros has no rms to divide by.
    return error / scale if scale else error
