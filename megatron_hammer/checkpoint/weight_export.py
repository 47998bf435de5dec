"""Moves every weight from a checkpoint into safetensors shards, and proves each one as soon as it is written.

One tensor is in memory at a time. It must be finite; what was written is read back from the file and must be the bits
that were meant; and these, merged by the inverse layout, must be the checkpoint's bits again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_hammer.checkpoint.architecture import Architecture
from megatron_hammer.checkpoint.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint.mapping import TensorPair
from megatron_hammer.checkpoint.reader import CheckpointReader
from megatron_hammer.checkpoint.safetensors_stream import Shard, ShardWriter
from megatron_hammer.errors import ConversionError


def write_verified_weights(
    directory: Path,
    shards: Sequence[Shard],
    pairs: Sequence[TensorPair],
    model: Architecture,
    reader: CheckpointReader,
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None],
) -> None:
    """Write every tensor of `pairs` in `dtype`; `on_tensor(done, total)` is told of each one written and verified.

    Raises one ConversionError that names every tensor with NaN or infinity, or that did not read back equal.
    """
    problems = []
    with ShardWriter(directory, shards, dtype=dtype) as writer:
        for number, pair in enumerate(pairs, start=1):
            problems += _write_pair(writer, pair, model, reader, dtype)
            on_tensor(number, len(pairs))
    if problems:
        raise ConversionError(*problems)


def _write_pair(
    writer: ShardWriter, pair: TensorPair, model: Architecture, reader: CheckpointReader, dtype: torch.dtype
) -> list[str]:
    """Write one Megatron tensor as Hugging Face's; returns a sentence for each thing that is wrong with it."""
    problems = []
    source = reader.read(pair.megatron_name).to(dtype)
    if not is_finite(source):
        problems.append(
            f"{pair.megatron_name}: weights must be finite in {str(dtype).removeprefix('torch.')}, got NaN or infinity "
            f"in {reader.directory}. Export an earlier iteration, or another --dtype."
        )
    parts = [part.contiguous() for part in pair.layout.split(source, model)]
    is_on_disk = [writer.holds(writer.write(name, part), part) for name, part in zip(pair.hf_names, parts, strict=True)]
    if not all(is_on_disk) or not is_bitwise_equal(pair.layout.merge(parts, model), source):
        problems.append(
            f"{pair.megatron_name}: what was written must read back equal to the checkpoint, got a difference. "
            "Check the disk; if it is sound, this is a defect of the converter."
        )
    return problems
