"""Writes safetensors shards one tensor at a time, so that a model of any size needs memory for its largest tensor only.

safetensors' own `save_file` wants a whole shard in memory. Format: eight bytes of header length, a JSON header of
{name: dtype, shape, data_offsets}, then the data. Source: github.com/huggingface/safetensors, README "Format".
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.bit_patterns import is_bitwise_equal

INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_ALIGNMENT_BYTES = 8
_BLOCK_BYTES = 4 << 20


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


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """Where a tensor lies in a file that is still open."""

    file: FileIO
    start: int

    def holds(self, tensor: Tensor) -> bool:
        """Whether the file has exactly these bits there: reads them back from it."""
        start, data = self.start, _bytes_of(tensor)
        buffer = torch.empty(min(len(data), _BLOCK_BYTES), dtype=torch.uint8)
        for block in data.split(_BLOCK_BYTES):
            into = buffer[: len(block)]
            if os.preadv(self.file.fileno(), [memoryview(into.numpy())], start) != len(block):
                return False
            if not is_bitwise_equal(into, block):
                return False
            start += len(block)
        return True


class ShardWriter:
    """Shards being written into `directory`, tensor by tensor in the order of `shards`; use as a context.

    The files stay open until the context ends. If it ends without an exception, the index of several shards is written.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], *, dtype: torch.dtype):
        self._directory = directory
        self._shards = shards
        self._dtype = dtype
        self._order = iter([(shard, name) for shard in shards for name in shard.shapes])
        self._files: dict[str, FileIO] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            if (missing := next(self._order, None)) is not None:
                raise ValueError(f"{missing[1]} was planned and never written")
            if len(self._shards) > 1:
                _write_index(self._directory, self._shards, self._dtype)

    def write(self, name: str, tensor: Tensor) -> WrittenTensor:
        """Append the next tensor to its shard."""
        shard, expected_name = next(self._order)
        shape = shard.shapes[expected_name]
        if name != expected_name or tuple(tensor.shape) != shape or tensor.dtype != self._dtype:
            raise ValueError(f"{name} {tensor.shape} {tensor.dtype} came where {expected_name} was planned")
        file = self._files.get(shard.file_name)
        if file is None:
            file = self._files[shard.file_name] = FileIO(self._directory / shard.file_name, "w+")
            _write_all(file, _build_header(shard, self._dtype))
        start = file.tell()
        _write_all(file, memoryview(_bytes_of(tensor).numpy()))
        return WrittenTensor(file, start)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    """One write call takes at most 2 GiB."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]


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


def _write_index(directory: Path, shards: Sequence[Shard], dtype: torch.dtype) -> None:
    total_bytes = sum(math.prod(shape) * dtype.itemsize for shard in shards for shape in shard.shapes.values())
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.shapes},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
