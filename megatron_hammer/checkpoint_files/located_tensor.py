"""A tensor inside a file that torch or safetensors wrote: where its elements lie, and how they are read without a copy.

Shared by the weights of Hugging Face folders (safetensors/) and legacy checkpoints (legacy/).
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.saved_archive import ArchiveDamage, SavedArchive
from megatron_hammer.errors import ConversionError


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedTensor:
    """Where a tensor's elements lie: `start` in bytes from the beginning of the file, `stride` in elements.

    in_memory: the tensor itself, where the file is of a format that cannot be mapped. archive: of torch.save, whose
    checksum of these elements is compared before they are used; None where the format has none.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    in_memory: Tensor | None = None
    archive: SavedArchive | None = None


def locate_in_storage(path: Path, tensor: Tensor, archive: SavedArchive | None) -> LocatedTensor:
    """Where a tensor lies that torch.load made from `path`: on the meta device from an archive, else in memory."""
    storage: Any = tensor.untyped_storage()
    # torch.load sets _checkpoint_offset on the meta device: where the storage begins in the file.
    start = storage._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize if archive else 0
    return LocatedTensor(
        path=path,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        start=start,
        in_memory=None if archive else tensor.detach(),
        archive=archive,
    )


def read_located(located: LocatedTensor, name: str) -> Tensor:
    """The tensor, a private view of the file where it can be mapped; `name` is for the error.

    Raises ConversionError if its bytes are not those that were saved, or the file has become shorter.
    """
    if located.in_memory is not None:
        return located.in_memory
    if math.prod(located.shape) == 0:
        return torch.empty(located.shape, dtype=located.dtype)
    if located.archive is not None:
        try:
            located.archive.check_at(located.start)
        except ArchiveDamage as error:
            raise ConversionError(
                f"{located.path}: {name} must have the bytes that were saved, got: {error}. "
                "The file is damaged; copy it again."
            ) from error
    # A transposed tensor or a view is saved with its strides, so its elements may span more than their number.
    last_element = sum((size - 1) * step for size, step in zip(located.shape, located.stride, strict=True))
    return _map_elements(located, name, last_element + 1).as_strided(located.shape, located.stride)


def _map_elements(located: LocatedTensor, name: str, num_elements: int) -> Tensor:
    """The bytes of a tensor as a private memory map, one that no other tensor shares."""
    num_bytes = num_elements * located.dtype.itemsize
    # A memory map can only begin at a multiple of the granularity.
    first_page = located.start - located.start % mmap.ALLOCATIONGRANULARITY
    end = located.start + num_bytes
    with located.path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), end - first_page, access=mmap.ACCESS_COPY, offset=first_page)
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{located.path}: {name} must end at byte {end:,}, got {error}. Something else writes this file."
            ) from error
    mapped.madvise(mmap.MADV_WILLNEED)  # the kernel reads ahead instead of one page per fault
    if located.start % located.dtype.itemsize:  # files of before safetensors aligned its data
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=located.start - first_page)
        return raw.clone().view(located.dtype)
    return torch.frombuffer(mapped, dtype=located.dtype, count=num_elements, offset=located.start - first_page)
