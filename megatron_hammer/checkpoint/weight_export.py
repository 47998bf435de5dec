"""Moves every weight from a checkpoint into safetensors shards, and proves each one as soon as it is written.

It must be finite; what was written is read back from the file and must be the bits that were meant; and these, merged
by the inverse layout, must be the checkpoint's bits again. At most two tensors are in memory, and of large ones one.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.checkpoint.architecture import Architecture
from megatron_hammer.checkpoint.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint.mapping import TensorPair
from megatron_hammer.checkpoint.reader import CheckpointReader
from megatron_hammer.checkpoint.safetensors_stream import Shard, ShardWriter, WrittenTensor
from megatron_hammer.errors import ConversionError

# Up to this size a tensor is proved by a second thread while the next one is read and written.
_MAX_OVERLAPPED_BYTES = 192 << 20


@dataclass(frozen=True, slots=True)
class _WrittenPair:
    """One Megatron tensor in the written dtype, its Hugging Face tensors, and where they were written."""

    pair: TensorPair
    source: Tensor
    parts: Sequence[Tensor]
    written: Sequence[WrittenTensor]


def write_verified_weights(
    directory: Path,
    shards: Sequence[Shard],
    pairs: Sequence[TensorPair],
    model: Architecture,
    reader: CheckpointReader,
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None],
) -> None:
    """Write every tensor of `pairs` in `dtype`; `on_tensor(done, total)` is told of each one.

    Raises one ConversionError that names every tensor with NaN or infinity, or that did not read back equal.
    """
    problems: list[str] = []
    pending: Future[list[str]] | None = None
    with ShardWriter(directory, shards, dtype=dtype) as writer, ThreadPoolExecutor(max_workers=1) as pool:
        for number, pair in enumerate(pairs, start=1):
            is_large = math.prod(pair.megatron_shape) * dtype.itemsize > _MAX_OVERLAPPED_BYTES
            if is_large and pending is not None:
                problems, pending = problems + pending.result(), None
            written = _write_pair(writer, pair, model, reader, dtype)
            if pending is not None:
                problems += pending.result()
            pending = pool.submit(_list_problems, written, model, reader.directory)
            del written  # the thread's from here on
            if is_large:
                problems, pending = problems + pending.result(), None
            on_tensor(number, len(pairs))
        if pending is not None:
            problems += pending.result()
    if problems:
        raise ConversionError(*problems)


def _write_pair(
    writer: ShardWriter, pair: TensorPair, model: Architecture, reader: CheckpointReader, dtype: torch.dtype
) -> _WrittenPair:
    source = reader.read(pair.megatron_name).to(dtype)
    parts = [part.contiguous() for part in pair.layout.split(source, model)]
    written = [writer.write(name, part) for name, part in zip(pair.hf_names, parts, strict=True)]
    return _WrittenPair(pair, source, parts, written)


def _list_problems(written: _WrittenPair, model: Architecture, directory: Path) -> list[str]:
    """A sentence for each thing that is wrong with a written tensor."""
    problems = []
    name, source = written.pair.megatron_name, written.source
    if not is_finite(source):
        problems.append(
            f"{name}: weights must be finite in {str(source.dtype).removeprefix('torch.')}, got NaN or infinity "
            f"in {directory}. Export an earlier iteration, or another --dtype."
        )
    is_on_disk = all(place.holds(part) for place, part in zip(written.written, written.parts, strict=True))
    if not is_on_disk or not is_bitwise_equal(written.pair.layout.merge(written.parts, model), source):
        problems.append(
            f"{name}: what was written must read back equal to the checkpoint, got a difference. "
            "Check the disk; if it is sound, this is a defect of the converter."
        )
    return problems
