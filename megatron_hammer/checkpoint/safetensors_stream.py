"""Writes safetensors shards one tensor at a time, so that a model of any size needs memory for its largest tensor only.

safetensors' own `save_file` wants a whole shard in memory. Format: eight bytes of header length, a JSON header of
{name: dtype, shape, data_offsets}, then the data. Source: github.com/huggingface/safetensors, README "Format".
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file and the shapes of the tensors in it, in the order in which they are written."""

    file_name: str
    shapes: Mapping[str, tuple[int, ...]]


def plan_shards(shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, max_shard_bytes: int) -> list[Shard]:
    """Cut the tensors, in their order, into shards of at most `max_shard_bytes` (or one tensor that is larger)."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    group_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and group_bytes + tensor_bytes > max_shard_bytes:
            groups.append({})
            group_bytes = 0
        groups[-1][name] = shape
        group_bytes += tensor_bytes
    if len(groups) == 1:
        return [Shard(file_name="model.safetensors", shapes=groups[0])]
    return [
        Shard(file_name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", shapes=group)
        for number, group in enumerate(groups, start=1)
    ]


def write_shards(
    directory: Path, shards: Iterable[Shard], tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype
) -> None:
    """Write `tensors`, which must come in the order of `shards`, and an index if there is more than one shard."""
    shards = list(shards)
    remaining = iter(tensors)
    for shard in shards:
        with (directory / shard.file_name).open("wb") as file:
            file.write(_build_header(shard, dtype))
            for expected_name, expected_shape in shard.shapes.items():
                name, tensor = next(remaining)
                if name != expected_name or tuple(tensor.shape) != expected_shape or tensor.dtype != dtype:
                    raise ValueError(f"{name} {tensor.shape} {tensor.dtype} came where {expected_name} was planned")
                file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    if len(shards) > 1:
        _write_index(directory, shards, dtype)


def _build_header(shard: Shard, dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT_BYTES)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_index(directory: Path, shards: list[Shard], dtype: torch.dtype) -> None:
    total_bytes = sum(math.prod(shape) * dtype.itemsize for shard in shards for shape in shard.shapes.values())
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.shapes},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
