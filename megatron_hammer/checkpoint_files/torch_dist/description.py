"""What `.metadata` says of a torch_dist directory, in types of our own, with every number and name checked.

The file is a pickle that anyone may have written: its records can have any attribute of any type. After this module no
other has to doubt them. Whether the files hold what it says is `store.py`'s question.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.checkpoint_files.pickle_reader import read_metadata
from megatron_hammer.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
_LIMIT = 1 << 62  # of elements and of bytes; beyond it, arithmetic of torch and of the system overflows
_MAX_AXES = 64  # of a tensor in torch


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a stored tensor that one rank wrote."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredGlobal:
    """One tensor under its key, with everything that the ranks cut it into."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlace:
    """Bytes [offset, offset + length) of the file `name` of the directory."""

    name: str
    offset: int
    length: int
    is_transformed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """tensors and objects: by key. places: where each chunk (key, offsets) and each object (key, ()) lies."""

    tensors: dict[str, StoredGlobal]
    objects: tuple[str, ...]
    places: dict[tuple[str, tuple[int, ...]], StoredPlace]


def read_description(path: Path) -> Description:
    """Read `.metadata`.

    Raises CheckpointError if the file is missing or damaged, holds a type or a number that such a file never has, or
    names a file outside its directory.
    """
    metadata = read_metadata(path)
    try:
        entries = metadata.state_dict_metadata
        # BytesStorageMetadata, the entry of an object, has no chunks.
        tensors = {_text(key): _describe(key, entry) for key, entry in entries.items() if hasattr(entry, "chunks")}
        # By name and offset only: MetadataIndex.index is a hint for searching, and torch does not compare it either.
        places = {
            (_text(index.fqn), _numbers(getattr(index, "offset", None) or ())): _describe_place(info)
            for index, info in metadata.storage_data.items()
        }
        objects = tuple(_text(key) for key in entries if key not in tensors)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = str(error)[:300] or type(error).__name__
        raise CheckpointError(
            f"{path}: contents must be what torch.distributed.checkpoint writes, got {reason}. "
            "The file is damaged or not of a checkpoint; use another iteration or copy it again."
        ) from error
    return Description(tensors=tensors, objects=objects, places=places)


def find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, if there are any; in n log n steps for boxes as ranks cut them."""
    boxes = [box for box in boxes if 0 not in box[1]]
    for axis in range(len(boxes[0][0]) if len(boxes) > 1 else 0):
        groups = _split(boxes, axis)
        if len(groups) > 1:  # boxes of different groups share nothing
            return next((found for group in groups if (found := find_overlap(group)) is not None), None)
    return next((pair for pair in itertools.combinations(boxes, 2) if _is_shared(*pair)), None)


def _split(boxes: Sequence[Box], axis: int) -> list[list[Box]]:
    """Groups of boxes, one after the other along `axis`, cut wherever no box reaches over the cut."""
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][axis]):
        first, size = box[0][axis], box[1][axis]
        if first >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, first + size)
    return groups


def _is_shared(box: Box, other: Box) -> bool:
    sides = zip(*box, *other, strict=True)
    return all(first < second + length and second < first + size for first, size, second, length in sides)


def _describe(key: Any, entry: Any) -> StoredGlobal:
    shape, dtype = _numbers(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} with a dtype of type {type(dtype).__name__}")
    if math.prod(shape) * dtype.itemsize >= _LIMIT:
        raise ValueError(f"{key} of shape {shape}, which no memory holds")
    chunks = tuple(StoredChunk(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in entry.chunks)
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            raise ValueError(f"{key} of shape {shape} with a chunk of {chunk.sizes} at {chunk.offsets}")
        if any(first + size > whole for first, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise ValueError(f"{key} of shape {shape} with a chunk of {chunk.sizes} at {chunk.offsets}")
    return StoredGlobal(shape=shape, dtype=dtype, chunks=chunks)


def _describe_place(info: Any) -> StoredPlace:
    name = _text(info.relative_path)
    # Megatron and torch write plain names. Any other could point to every file of this machine.
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"the file {name!r}, which is not a name in its directory")
    offset, length = _numbers((info.offset, info.length))
    is_transformed = bool(getattr(info, "transform_descriptors", None))
    return StoredPlace(name=name, offset=offset, length=length, is_transformed=is_transformed)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} in place of a name")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    """Whole numbers that are not negative and that memory can address."""
    if not isinstance(values, tuple | list | torch.Size) or len(values) > _MAX_AXES:
        raise TypeError(f"a {type(values).__name__} in place of sizes or offsets")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LIMIT:
            raise ValueError(f"{str(value)[:40]} in place of a size or an offset")
    return tuple(values)
