"""Writes safetensors shards one tensor at a time, so that a model of any size needs memory for its largest tensor only.

safetensors' own `save_file` wants a whole shard in memory. Format: see header.py.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.safetensors.header import build_header

INDEX_FILE = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """One file and the shapes and dtypes of the tensors in it, in the order in which they are written."""

    file_name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def count_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    fp32_names: Collection[str] = (),
) -> list[ShardFile]:
    """Cut the tensors, in their order, into shards of at most `max_shard_bytes` (or one tensor that is larger).

    fp32_names: the tensors that are fp32 whatever `dtype` is.
    """
    dtypes = {name: torch.float32 if name in fp32_names else dtype for name in shapes}
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    group_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * dtypes[name].itemsize
        # `groups[-1]`: a tensor that is larger than the limit gets its own shard, and no shard is empty.
        if groups[-1] and group_bytes + tensor_bytes > max_shard_bytes:
            groups.append({})
            group_bytes = 0
        groups[-1][name] = shape
        group_bytes += tensor_bytes
    if len(groups) == 1:
        return [ShardFile(file_name="model.safetensors", shapes=groups[0], dtypes=dtypes)]
    return [
        ShardFile(file_name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", shapes=group, dtypes=dtypes)
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
    """Shards being written into `directory`, each tensor at its place, from any thread; use as a context.

    The files stay open until the context ends. If it ends without an exception, the index of several shards is written.
    """

    def __init__(self, directory: Path, shards: Sequence[ShardFile]):
        self.directory = directory
        self._shards = shards
        # Of the tensors that are not written yet: shape, dtype and place.
        self._places: dict[str, tuple[tuple[int, ...], torch.dtype, WrittenTensor]] = {}

    def __enter__(self) -> "ShardWriter":
        for shard in self._shards:
            file = FileIO(self.directory / shard.file_name, "w+")
            described = [
                (name, DTYPE_NAMES[shard.dtypes[name]], shape, shard.count_bytes(name))
                for name, shape in shard.shapes.items()
            ]
            # transformers' save_pretrained writes the same metadata.
            header = build_header(described, {"format": "pt"})
            write_at(file, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))  # it wants a writable buffer
            start = len(header)
            for name, shape in shard.shapes.items():
                self._places[name] = shape, shard.dtypes[name], WrittenTensor(file, start)
                start += shard.count_bytes(name)
        # Kept apart from the places, which take() removes.
        self._files = {place.file for _, _, place in self._places.values()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for file in self._files:
            file.close()
        if kind is None:
            if self._places:
                raise ValueError(f"{', '.join(self._places)} was planned and never written")
            if len(self._shards) > 1:
                _write_index(self.directory, self._shards)

    def write(self, name: str, tensor: Tensor) -> WrittenTensor:
        """Write a planned tensor, once."""
        place = self.take(name, tuple(tensor.shape), tensor.dtype)
        write_at(place.file, place.start, tensor)
        return place

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WrittenTensor:
        """The place of a planned tensor. It can be taken once, and the caller then writes the whole tensor."""
        if name not in self._places:
            raise ValueError(f"{name} was not planned, or came twice")
        planned_shape, planned_dtype, place = self._places.pop(name)
        if shape != planned_shape or dtype != planned_dtype:
            raise ValueError(f"{name} was planned as {planned_shape} {planned_dtype}, got {shape} {dtype}")
        return place


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def write_at(file: FileIO, start: int, tensor: Tensor) -> None:
    """Write the bytes of a tensor at byte `start`, in several system calls: one takes at most 2 GiB."""
    data = memoryview(_bytes_of(tensor).numpy())
    while data:
        num_written = os.pwrite(file.fileno(), data, start)
        data, start = data[num_written:], start + num_written


def _write_index(directory: Path, shards: Sequence[ShardFile]) -> None:
    total_bytes = sum(shard.count_bytes(name) for shard in shards for name in shard.shapes)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.shapes},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
