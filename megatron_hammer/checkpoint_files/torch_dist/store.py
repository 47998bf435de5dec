"""What one torch_dist directory holds, by its own keys: every tensor (the optimizer's too), objects, common state.

No process group, GPU or megatron. A tensor is a box of numbers cut into chunks that ranks wrote into their files; a
read gives any box of it, as a view of the file where one chunk holds all of it. `reader.py` is the view by the names
of a model's layers; `writer.py` makes such directories.
"""

import io
import itertools
import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.pickle_reader import read_object
from megatron_hammer.checkpoint_files.saved_archive import ArchiveDamage, SavedArchive
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import find_damage, read_hashes
from megatron_hammer.checkpoint_files.torch_dist.description import (
    Box,
    StoredChunk,
    StoredPlace,
    find_overlap,
    read_description,
)
from megatron_hammer.checkpoint_files.torch_dist.saved_tensor import find_saved_tensor, map_tensor, read_into
from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import is_present

COMMON_STATE_KEY = "common_state/shard_0_1"
LEGACY_COMMON_FILE = "common.pt"
# torch.save aligns data to this within its archive, so an archive that starts at a multiple can be mapped.
ALIGNMENT_BYTES = 64


class TorchDistStore:
    """One iteration's directory, opened. Nothing but the metadata is read before it is asked for.

    tensors: by key, layers stacked as megatron stores them. objects: keys of the non-tensor entries, except the
    common state.
    common_state: arguments, iteration, param groups and schedules. Raises CheckpointError without the first two.
    Raises CheckpointError if the metadata is missing, damaged or of another format, or a file is a link out of the
    directory.
    """

    def __init__(self, directory: Path):
        _validate_format(directory)
        self.directory = directory
        described = read_description(directory / ".metadata")
        self.tensors, self._storage = described.tensors, described.places
        self.objects = tuple(key for key in described.objects if key != COMMON_STATE_KEY)
        self._paths = _find_files(directory, {place.name for place in self._storage.values()})
        self._checked: set[tuple[str, int]] = set()  # archives whose checksums were compared: file, offset
        self._hashes = read_hashes(directory) or {}
        self._checked_files: set[str] = set()  # that have the hash with which they were saved
        self._file_locks: dict[str, threading.Lock] = {}  # threads that need one file do not each hash it
        self._chunks_by_leading: dict[tuple[str, int], dict[tuple[int, ...], list[StoredChunk]]] = {}

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """megatron-core 0.19 stores it among the shards; earlier versions in common.pt."""
        legacy_path = self.directory / LEGACY_COMMON_FILE
        if legacy_path.is_file():
            state = read_object(io.BytesIO(legacy_path.read_bytes()), where=legacy_path)
        else:
            state = self._read_item(COMMON_STATE_KEY, ())
        # Megatron saves a ShardedObject as a list of its one value.
        state = state[0] if isinstance(state, list) and len(state) == 1 else state
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{self.directory}: common state must be a dictionary, got {type(state).__name__}. "
                "Pass a checkpoint that Megatron's training loop saved."
            )
        if "args" not in state or "iteration" not in state:
            raise CheckpointError(
                f"{self.directory}: common state must hold args and iteration, got {sorted(state)}. "
                "Pass a checkpoint that Megatron's training loop saved."
            )
        return state

    def validate(self, keys: Iterable[str] | None = None) -> None:
        """Raise one CheckpointError with a sentence for every file and tensor that is incomplete.

        keys: only what these need (everything). Looks at sizes and metadata, reads no tensor.
        """
        tensor_keys = list(self.tensors if keys is None else keys)
        wanted = {COMMON_STATE_KEY, *tensor_keys, *(self.objects if keys is None else ())}
        problems = [*self._list_damaged_files(wanted), *self._list_unfinished_tensors(tensor_keys)]
        problems += [] if problems else self._list_damaged_gaps()
        if problems:
            raise CheckpointError(*problems)

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box at `offsets` of `sizes` of a tensor, in its stored dtype.

        A view of the file (private: writing to it does not change the file) where one chunk covers the box, else
        assembled in memory. Raises CheckpointError if chunks are missing or damaged.
        """
        box = (tuple(offsets), tuple(sizes))
        # The box is one chunk: no search through all chunks of the tensor.
        if (key, box[0]) in self._storage and StoredChunk(*box) in self._chunk_sets[key]:
            return self._read_chunk(key, StoredChunk(*box))
        touched = [(chunk, overlap) for chunk in self.tensors[key].chunks if (overlap := _overlap(box, chunk))]
        if len(touched) == 1 and math.prod(touched[0][1].sizes) == math.prod(box[1]):
            chunk, overlap = touched[0]
            return self._read_chunk(key, chunk)[overlap.out_of]
        return self._assemble(key, box, touched)

    def list_chunks(self, key: str, leading: tuple[int, ...]) -> list[StoredChunk]:
        """The chunks of a tensor whose offsets begin with `leading`."""
        index = (key, len(leading))
        if index not in self._chunks_by_leading:
            groups: dict[tuple[int, ...], list[StoredChunk]] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                groups[chunk.offsets[: len(leading)]].append(chunk)
            self._chunks_by_leading[index] = groups
        return self._chunks_by_leading[index].get(leading, [])

    def find_chunk_start(self, file: FileIO, key: str, chunk: StoredChunk) -> int | None:
        """Where in `file`, which is the chunk's, its elements begin, one after the other; None if they do not."""
        self._check_file(self._locate(key, chunk.offsets)[1])
        self.check_content(key, chunk.offsets)
        info, _ = self._locate(key, chunk.offsets)
        dtype = self.tensors[key].dtype
        return find_saved_tensor(file, offset=info.offset, length=info.length, shape=chunk.sizes, dtype=dtype)

    def check_content(self, key: str, offsets: tuple[int, ...] = ()) -> None:
        """Compare the checksums of a chunk or an object with its bytes, once; raises CheckpointError if they differ."""
        info, path = self._locate(key, offsets)
        if (info.name, info.offset) in self._checked or info.name in self._checked_files:
            return
        try:
            SavedArchive(path, info.offset, info.length).check_all()
        except (ArchiveDamage, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {key} must have the bytes that were saved at offset {info.offset}, got: {error}. "
                "The file is damaged; copy it again or use another iteration."
            ) from error
        self._checked.add((info.name, info.offset))

    def _check_file(self, path: Path) -> None:
        """Compare the hash of a whole file, before the first tensor of it is used; raises CheckpointError."""
        if path.name not in self._hashes:
            return
        with self._file_locks.setdefault(path.name, threading.Lock()):
            if path.name in self._checked_files:
                return
            if problems := find_damage(self.directory, {path.name: self._hashes[path.name]}):
                raise CheckpointError(*problems)
            self._checked_files.add(path.name)

    def list_places(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Of every chunk and object: its key, its offsets (none for an object), and the name of its file."""
        for (key, offsets), place in self._storage.items():
            yield key, offsets, place.name

    def file_of(self, key: str, chunk: StoredChunk) -> str:
        """The name of the file that holds a chunk."""
        return self._locate(key, chunk.offsets)[1].name

    def read_object(self, key: str) -> Any:
        """The object stored under one of `objects`; megatron's own types become inert records."""
        return self._read_item(key, ())

    def read_object_bytes(self, key: str) -> bytes:
        """The torch file stored under one of `objects`, unopened."""
        return self._read_bytes(key, ())[0]

    @cached_property
    def _chunk_sets(self) -> dict[str, frozenset[StoredChunk]]:
        return {key: frozenset(stored.chunks) for key, stored in self.tensors.items()}

    def _assemble(self, key: str, box: Box, touched: Sequence[tuple[StoredChunk, "_Overlap"]]) -> Tensor:
        result = torch.empty(box[1], dtype=self.tensors[key].dtype)
        num_filled = 0
        for chunk, overlap in touched:
            target = result[overlap.into]
            # Straight into its place: no second copy of the chunk in memory.
            if overlap.sizes == chunk.sizes and target.is_contiguous():
                self._read_chunk(key, chunk, target)
            else:
                target.copy_(self._read_chunk(key, chunk)[overlap.out_of])
            num_filled += target.numel()
        # torch.empty: elements that no chunk covers would be arbitrary numbers.
        if num_filled != result.numel():
            raise CheckpointError(_unfinished(self.directory, key, result.numel(), num_filled))
        return result

    def _list_damaged_files(self, keys: set[str]) -> Iterator[str]:
        needed_bytes: dict[str, int] = {}
        for (key, _), place in self._storage.items():
            if key in keys:
                needed_bytes[place.name] = max(needed_bytes.get(place.name, 0), place.offset + place.length)
        for name, num_bytes in sorted(needed_bytes.items()):
            path = self.directory / name
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            if not path.is_file() or path.stat().st_size < num_bytes:
                yield (
                    f"{path}: must hold at least {num_bytes} bytes, got {found}. "
                    "The save was interrupted or the copy is incomplete; use another iteration or copy it again."
                )

    def _list_damaged_gaps(self) -> Iterator[str]:
        """Our writer aligns archives with zeros; no checksum covers these."""
        places: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for place in self._storage.values():
            places[place.name].add((place.offset, place.offset + place.length))
        for name, ranges in sorted(places.items()):
            path, ordered = self.directory / name, sorted(ranges)
            gaps = [(end, start) for (_, end), (start, _) in itertools.pairwise([(0, 0), *ordered])]
            gaps = [(end, start) for end, start in gaps if 0 < start - end < ALIGNMENT_BYTES]
            if not gaps or not path.is_file():  # a file of the optimizer alone may have been left out of a copy
                continue
            with _open(path) as file:
                for end, start in gaps:
                    if any(os.pread(file.fileno(), start - end, end)):
                        yield (
                            f"{path}: bytes between two tensors must be zero, got others at offset {end}. "
                            "The file is damaged; copy it again or use another iteration."
                        )

    def _list_unfinished_tensors(self, keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            stored = self.tensors[key]
            written = [chunk for chunk in stored.chunks if (key, chunk.offsets) in self._storage]
            num_elements, num_written = math.prod(stored.shape), sum(math.prod(chunk.sizes) for chunk in written)
            if num_written != num_elements:
                yield _unfinished(self.directory, key, num_elements, num_written)
            # As many elements as the tensor has, but some of them twice, would leave others without a value.
            elif (pair := find_overlap([(chunk.offsets, chunk.sizes) for chunk in written])) is not None:
                (first, _), (second, sizes) = pair
                yield (
                    f"{self.directory / '.metadata'}: chunks of {key} must not overlap, got those at {first} and at "
                    f"{second} of {sizes}. The file is damaged; copy it again or use another iteration."
                )

    def _read_chunk(self, key: str, chunk: StoredChunk, target: Tensor | None = None) -> Tensor:
        """The chunk, in `target` if that is given: contiguous, of its shape."""
        dtype = self.tensors[key].dtype
        with _open(self._locate(key, chunk.offsets)[1]) as file:
            start = self.find_chunk_start(file, key, chunk)
            if start is not None and target is None:
                return map_tensor(file, start, chunk.sizes, dtype)
            if start is not None and target is not None:
                read_into(file, start, target)
                return target
        # What find_saved_tensor could not locate; torch.load reads it, or says what is wrong.
        part = self._read_item(key, chunk.offsets)
        if not isinstance(part, Tensor) or tuple(part.shape) != chunk.sizes or part.dtype != dtype:
            found = f"{tuple(part.shape)} {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise CheckpointError(
                f"{self.directory}: {key} must have a chunk of shape {chunk.sizes} {dtype} at {chunk.offsets}, "
                f"got {found}. The file is damaged; use another iteration."
            )
        return part if target is None else target.copy_(part)

    def _read_item(self, key: str, offsets: tuple[int, ...]) -> Any:
        data, path = self._read_bytes(key, offsets)
        return read_object(io.BytesIO(data), where=f"{path} ({key})")

    def _read_bytes(self, key: str, offsets: tuple[int, ...]) -> tuple[bytes, Path]:
        self.check_content(key, offsets)
        info, path = self._locate(key, offsets)
        with _open(path) as file:
            file.seek(info.offset)
            return file.read(info.length), path

    def _locate(self, key: str, offsets: tuple[int, ...]) -> tuple[StoredPlace, Path]:
        info = self._storage.get((key, offsets))
        if info is None or info.is_transformed:
            what = "nothing" if info is None else "data that was transformed"
            raise CheckpointError(
                f"{self.directory / '.metadata'}: {key} must be stored as plain data, got {what}. "
                "Save the checkpoint again with --ckpt-format torch_dist."
            )
        return info, self._paths[info.name]


def _find_files(directory: Path, names: set[str]) -> dict[str, Path]:
    """The path of each file by its name; raises CheckpointError for links that lead out of the checkpoint.

    Where `.metadata` is a link too, as in the cache of Hugging Face's hub, its target's folder belongs to it.
    """
    folders = {os.path.realpath(directory), os.path.dirname(os.path.realpath(directory / ".metadata"))}
    paths = {name: directory / name for name in sorted(names)}
    if strays := [path for path in paths.values() if os.path.dirname(os.path.realpath(path)) not in folders]:
        raise CheckpointError(
            *(
                f"{path}: must lie in the checkpoint's own folder, got a link to {os.path.realpath(path)}. "
                "Put the file there, if the link is yours."
                for path in strays
            )
        )
    return paths


def _open(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except OSError as error:
        raise CheckpointError(f"{path}: file must be readable, got {error.strerror}. Copy it again.") from error


def _validate_format(directory: Path) -> None:
    description = directory / "metadata.json"
    is_there = is_present(description, raises=CheckpointError)
    try:
        backend = json.loads(description.read_bytes())["sharded_backend"] if is_there else "torch_dist"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{description}: must name the sharded_backend, got {error}. The copy is incomplete; copy it again."
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(
            f"{directory}: format must be torch_dist, got sharded_backend={backend}. "
            "Load it in training and save it with --ckpt-format torch_dist."
        )


def _unfinished(directory: Path, key: str, num_elements: int, num_written: int) -> str:
    return (
        f"{directory}: {key} must have {num_elements} elements in its chunks, got {num_written}. "
        "Some ranks did not finish saving; use another iteration."
    )


@dataclass(frozen=True, slots=True)
class _Overlap:
    """The slices of the wanted box and of a chunk that are the same elements."""

    into: tuple[slice, ...]
    out_of: tuple[slice, ...]
    sizes: tuple[int, ...]


def _overlap(box: Box, chunk: StoredChunk) -> _Overlap | None:
    """None if they do not overlap."""
    into, out_of, sizes = [], [], []
    for start, size, chunk_start, chunk_size in zip(*box, chunk.offsets, chunk.sizes, strict=True):
        first, last = max(start, chunk_start), min(start + size, chunk_start + chunk_size)
        if first >= last:
            return None
        into.append(slice(first - start, last - start))
        out_of.append(slice(first - chunk_start, last - chunk_start))
        sizes.append(last - first)
    return _Overlap(tuple(into), tuple(out_of), tuple(sizes))
