"""Moves every weight from a checkpoint into safetensors shards, and proves each one as soon as it is written.

It must be finite; what was written is read back from the file and must be the bits that were meant; and these, merged
by the inverse layout, must be the checkpoint's bits again. Two threads share the tensors, so at most two are in memory,
and of large ones one.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_hammer.checkpoint.architecture import Architecture
from megatron_hammer.checkpoint.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint.mapping import TensorPair
from megatron_hammer.checkpoint.reader import CheckpointReader
from megatron_hammer.checkpoint.safetensors_stream import Shard, ShardWriter
from megatron_hammer.errors import ConversionError

_NUM_THREADS = 2  # more would share one disk, and memory for each
_MAX_OVERLAPPED_BYTES = 192 << 20  # a larger tensor is alone in memory


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
    pending: deque[Future[list[str]]] = deque()
    num_done = 0

    def wait_for(num_left: int) -> None:
        nonlocal num_done
        while len(pending) > num_left:
            problems.extend(pending.popleft().result())
            num_done += 1
            on_tensor(num_done, len(pairs))

    with ShardWriter(directory, shards, dtype=dtype) as writer, ThreadPoolExecutor(_NUM_THREADS) as pool:
        for pair in pairs:
            is_large = math.prod(pair.megatron_shape) * dtype.itemsize > _MAX_OVERLAPPED_BYTES
            wait_for(0 if is_large else _NUM_THREADS - 1)
            pending.append(pool.submit(_write_pair, writer, pair, model, reader, dtype))
            if is_large:
                wait_for(0)
        wait_for(0)
    if problems:
        raise ConversionError(*problems)


def _write_pair(
    writer: ShardWriter, pair: TensorPair, model: Architecture, reader: CheckpointReader, dtype: torch.dtype
) -> list[str]:
    """Write one Megatron tensor as its Hugging Face tensors; returns a sentence for each thing wrong with it."""
    name, source = pair.megatron_name, reader.read(pair.megatron_name).to(dtype)
    parts = [part.contiguous() for part in pair.layout.split(source, model)]
    written = [writer.write(hf_name, part) for hf_name, part in zip(pair.hf_names, parts, strict=True)]
    problems = []
    if not is_finite(source):
        problems.append(
            f"{name}: weights must be finite in {str(dtype).removeprefix('torch.')}, got NaN or infinity "
            f"in {reader.directory}. Export an earlier iteration, or another --dtype."
        )
    is_on_disk = all(place.holds(part) for place, part in zip(written, parts, strict=True))
    if not is_on_disk or not is_bitwise_equal(pair.layout.merge(parts, model), source):
        problems.append(
            f"{name}: what was written must read back equal to the checkpoint, got a difference. "
            "Check the disk; if it is sound, this is a defect of the converter."
        )
    return problems
