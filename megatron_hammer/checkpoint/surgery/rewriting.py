"""Writes an edited checkpoint box by box, reads it back, and renames it into place only after that.

An edit is a plan: every tensor, its boxes, and a function that computes any box from the source. The same function
writes and verifies, and peak memory is one box. This file serves every edit.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.surgery.training_checkpoint import TrainingCheckpoint
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.torch_dist.description import Box, StoredGlobal
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.checkpoint_files.torch_dist.writer import open_checkpoint_writer
from megatron_hammer.errors import ConversionError

ReadBox = Callable[[tuple[int, ...], tuple[int, ...]], Tensor]
OnTensor = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """A tensor to be written. read: any of its boxes; called once to write it and once to verify it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: Sequence[Box]
    read: ReadBox

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCheckpoint:
    """Everything that the edited checkpoint holds. objects: the raw bytes of the non-tensor entries, read when needed.

    iteration: None for a release.
    """

    tensors: Sequence[PlannedTensor]
    objects: Mapping[str, Callable[[], bytes]]
    common_state: dict[str, Any]
    iteration: int | None


def plan_copy(
    checkpoint: TrainingCheckpoint, key: str, boxes: Sequence[Box] | None = None, *, written_as: str | None = None
) -> PlannedTensor:
    """An unchanged tensor, in the given boxes or in its own."""
    stored: StoredGlobal = checkpoint.store.tensors[key]
    return PlannedTensor(
        key=written_as or key,
        shape=stored.shape,
        dtype=stored.dtype,
        boxes=[(chunk.offsets, chunk.sizes) for chunk in stored.chunks] if boxes is None else boxes,
        read=lambda offsets, sizes: checkpoint.store.read(key, offsets, sizes),
    )


def copy_objects(checkpoint: TrainingCheckpoint, keys: Sequence[str]) -> dict[str, Callable[[], bytes]]:
    """Non-tensor entries are not unpickled: their bytes are copied."""
    return {key: functools.partial(checkpoint.store.read_object_bytes, key) for key in keys}


def write_planned_checkpoint(
    save_dir: Path,
    planned: PlannedCheckpoint,
    on_tensor: OnTensor = lambda stage, done, total: None,
    *,
    sources: Sequence[TrainingCheckpoint],
    overwrite: bool = False,
) -> None:
    """Write `save_dir/iter_N` (or release) and the tracker file, complete and read back, or nothing.

    Raises ConversionError if the target is taken or one of `sources`, if a tensor holds NaN or infinity, or does not
    read back equal.
    """
    directories = [checkpoint.directory for checkpoint in sources]
    with open_checkpoint_writer(
        save_dir, iteration=planned.iteration, overwrite=overwrite, sources=directories
    ) as writer:
        not_finite = []
        for number, tensor in enumerate(planned.tensors, start=1):
            writer.declare(tensor.key, tensor.shape, tensor.dtype)
            is_finite = True
            for offsets, sizes in tensor.boxes:
                # A box may be a view with other strides, such as some columns of a matrix; chunks are in row order.
                part = tensor.read(offsets, sizes).contiguous()
                is_finite = is_finite and bool(torch.isfinite(part).all())
                writer.write_chunk(tensor.key, offsets, part)
            if not is_finite:
                not_finite.append(tensor.key)
            on_tensor("writing", number, len(planned.tensors))
        # Before `commit`, so that nothing is renamed into place.
        if not_finite:
            raise ConversionError(
                *(f"{key}: values must be finite, got NaN or infinity. Use an earlier iteration." for key in not_finite)
            )
        for key, read_bytes in planned.objects.items():
            writer.write_object_bytes(key, read_bytes())
        writer.commit(planned.common_state)
        # Inside the writer's block: an error here removes what was written.
        _verify(writer.directory, planned, on_tensor)


def _verify(directory: Path, planned: PlannedCheckpoint, on_tensor: OnTensor) -> None:
    """Open what was written as any reader would, and compare every box bit for bit."""
    store = TorchDistStore(directory)
    store.validate()
    different = [key for key, read_bytes in planned.objects.items() if store.read_object_bytes(key) != read_bytes()]
    # Both ways: tensors that are missing, and tensors that nobody planned.
    different += sorted(store.tensors.keys() ^ {tensor.key for tensor in planned.tensors})
    for number, tensor in enumerate(planned.tensors, start=1):
        if not all(is_bitwise_equal(store.read(tensor.key, *box), tensor.read(*box)) for box in tensor.boxes):
            different.append(tensor.key)
        on_tensor("verifying", number, len(planned.tensors))
    if different:
        raise ConversionError(
            *(
                f"{key}: what was written must read back equal, got a difference. "
                "Check the disk; if it is sound, this is a defect of the tool."
                for key in different
            )
        )
