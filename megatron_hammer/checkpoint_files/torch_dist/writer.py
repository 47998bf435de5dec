"""Writes a torch_dist checkpoint one piece at a time, with no process group, GPU or megatron: what `--load` takes.

The tensors are Megatron's global ones, under its own keys (layers stacked), cut into boxes in any way; each box goes to
disk when it comes, so that memory is needed for one box. `.metadata` and metadata.json, without which nothing loads,
come last, then the folder is renamed, then the tracker points to it. `store.py` reads such a directory.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE, RELEASE, name_folder, read_tracker
from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.checkpoint_files.saved_archive import ArchiveDamage, SavedArchive
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import FileHash, HashingFile, write_hashes
from megatron_hammer.checkpoint_files.torch_dist.description import Description, StoredChunk, StoredGlobal, StoredPlace
from megatron_hammer.checkpoint_files.torch_dist.metadata_file import write_description
from megatron_hammer.checkpoint_files.torch_dist.saved_tensor import find_saved_tensor, map_tensor
from megatron_hammer.checkpoint_files.torch_dist.store import ALIGNMENT_BYTES, COMMON_STATE_KEY
from megatron_hammer.errors import ConversionError
from megatron_hammer.files.publish import publish_directory, publish_files, require_apart

MAX_FILE_BYTES = 4 << 30
_BLOCK_BYTES = 1 << 19  # of one write

Offsets = tuple[int, ...]


@dataclass(slots=True)
class _Declared:
    """A global tensor and the sizes of its boxes that have been written, by their offsets."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: dict[Offsets, tuple[int, ...]] = field(default_factory=dict)


class CheckpointWriter:
    """One iteration being written into `directory`; obtain it with `open_checkpoint_writer`.

    Every declared tensor must be covered by its chunks when `commit` is called; else it raises ValueError, because that
    is an error of the calling code.
    """

    def __init__(self, directory: Path, *, max_file_bytes: int = MAX_FILE_BYTES):
        self.directory = directory
        self.num_bytes = 0
        self.is_committed = False
        self._max_file_bytes = max_file_bytes
        self._declared: dict[str, _Declared] = {}
        self._stored: dict[tuple[str, Offsets | None], StoredPlace] = {}
        self._num_files = 0
        self._file: HashingFile | None = None
        self._hashes: dict[str, FileHash] = {}  # of the files that are complete

    def declare(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Announce a global tensor under Megatron's key; its chunks follow in any order."""
        if key in self._declared:
            raise ValueError(f"{key} is declared twice")
        self._declared[key] = _Declared(tuple(shape), dtype)

    def write_chunk(self, key: str, offsets: Sequence[int], tensor: Tensor) -> None:
        """Write one box of a declared tensor; `tensor` has as many axes and the same dtype.

        Afterwards any thread may read it back, also while the next one is written.
        """
        declared, at = self._declared[key], tuple(offsets)
        ends = [start + size for start, size in zip(at, tensor.shape, strict=True)]
        is_inside = len(at) == len(declared.shape) and all(
            start >= 0 and end <= size for start, end, size in zip(at, ends, declared.shape, strict=True)
        )
        if not is_inside or tensor.dtype != declared.dtype or at in declared.chunks:
            raise ValueError(f"{key}: {tuple(tensor.shape)} {tensor.dtype} at {at} is no new box of {declared}")
        with self._append(key, at) as file:
            torch.save(_own_storage(tensor), file)  # type: ignore[arg-type]
        declared.chunks[at] = tuple(tensor.shape)

    def read_chunk(self, key: str, offsets: Sequence[int]) -> Tensor:
        """A chunk that was written, read back from the file: a view of it.

        Raises ConversionError unless every header around it is as written.
        """
        declared, at = self._declared[key], tuple(offsets)
        place = self._stored[(key, at)]
        path, sizes = self.directory / place.name, declared.chunks[at]
        start, reason = None, "headers of another tensor"
        with path.open("rb", buffering=0) as file:
            try:
                # Without the checksum of the elements: the caller compares the numbers themselves.
                SavedArchive(path, place.offset, place.length)
                start = find_saved_tensor(
                    file, offset=place.offset, length=place.length, shape=sizes, dtype=declared.dtype
                )
            except (ArchiveDamage, OSError, ValueError) as error:
                reason = str(error)
            if start is None:
                raise ConversionError(f"{path}: {key} must read back as it was written, got {reason}. Check the disk.")
            return map_tensor(file, start, sizes, declared.dtype)

    def write_object(self, key: str, value: Any) -> None:
        """Write a non-tensor entry (Megatron's ShardedObject: a list of one value) as torch.save does."""
        self.write_object_bytes(key, dump_object(value))

    def write_object_bytes(self, key: str, data: bytes) -> None:
        """Write an object that is a torch file already."""
        if (key, None) in self._stored:
            raise ValueError(f"{key} is written twice")
        with self._append(key, None) as file:
            file.write(data)

    def commit(self, common_state: Mapping[str, Any]) -> None:
        """Write the common state and what makes the directory a checkpoint; nothing can be added to it afterwards.

        common_state: at least `args` and `iteration`, as Megatron's training loop saves it.
        """
        incomplete = [key for key, declared in self._declared.items() if not _is_covered(declared)]
        if incomplete:
            raise ValueError(f"chunks do not cover {', '.join(incomplete)}")
        self.write_object(COMMON_STATE_KEY, [dict(common_state)])
        self._close_file()
        write_description(self.directory / ".metadata", self._describe())
        # Source: megatron.core.dist_checkpointing.core.CheckpointingConfig.
        description = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.directory / "metadata.json").write_text(json.dumps(description))
        self.is_committed = True

    @property
    def hashes(self) -> Mapping[str, FileHash]:
        """Of the files with tensors, by name, once they are closed: computed while they were written."""
        return self._hashes

    def close(self) -> None:
        """Close the files; without `commit` they are no checkpoint."""
        with suppress(OSError):  # of a full disk, which has been reported
            self._close_file()

    @contextmanager
    def _append(self, key: str, offsets: Offsets | None) -> Iterator["_Sink"]:
        """Where to append; what the block writes is stored under `key`. Raises what stopped a write as it is."""
        if self.is_committed:
            raise ValueError(f"{key}: the checkpoint is complete")
        if self._file is not None and self._file.tell() >= self._max_file_bytes:
            self._close_file()
        if self._file is None:
            # As torch.distributed.checkpoint.filesystem names the files of rank 0.
            self._file = HashingFile(self.directory / f"__0_{self._num_files}.distcp")
            self._num_files += 1
        self._file.write(bytes(-self._file.tell() % ALIGNMENT_BYTES))
        start = self._file.tell()
        sink = _Sink(self._file)
        try:
            yield sink
        except RuntimeError as error:
            interrupt = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else None
            raise (sink.error or interrupt or error) from None
        # Other threads read the chunk back by the file's name.
        self._file.flush()
        length = self._file.tell() - start
        name = _name_of(self._file)
        self._stored[(key, offsets)] = StoredPlace(name=name, offset=start, length=length, is_transformed=False)
        self.num_bytes += length

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
            self._hashes[_name_of(file)] = file.content

    def _describe(self) -> Description:
        return Description(
            tensors={
                key: StoredGlobal(
                    shape=declared.shape,
                    dtype=declared.dtype,
                    chunks=tuple(StoredChunk(offsets, sizes) for offsets, sizes in declared.chunks.items()),
                )
                for key, declared in self._declared.items()
            },
            objects=tuple(key for key, offsets in self._stored if offsets is None),
            places={(key, offsets or ()): place for (key, offsets), place in self._stored.items()},
        )


def _name_of(file: HashingFile) -> str:
    return Path(file.name).name


class _Sink:
    """A file that remembers the error that stopped a write: torch.save replaces it by a RuntimeError."""

    def __init__(self, file: HashingFile):
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            with memoryview(data) as view:
                # torch.save gives a tensor in one piece. Linux copies one that is a memory map of many MB five times
                # slower than its blocks, and a block is in the processor's cache when it is hashed and then written.
                for first in range(0, len(view), _BLOCK_BYTES):
                    self._file.write(view[first : first + _BLOCK_BYTES])
                return len(view)
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing: torch.save asks for it after every tensor."""


@contextmanager
def open_checkpoint_writer(
    save_dir: Path, *, iteration: int | None, overwrite: bool = False, sources: Sequence[Path] = ()
) -> Iterator[CheckpointWriter]:
    """A writer whose checkpoint appears under `save_dir` when the block ends, and not at all if it raises.

    iteration: of the state; None for a "release", from which Megatron starts at iteration 0 with a new optimizer.
    overwrite: replace what `save_dir` holds of this iteration, and let the tracker point to it whatever it names now.
    The tracker never goes back to an earlier iteration otherwise. sources: as in publish_directory. Raises
    ConversionError if the target is taken, and OutputError if it cannot be written or the disk is full.
    """
    name = name_folder(iteration)
    # Before the writer looks whether the target is taken, which it always is by a source.
    require_apart(save_dir / name, sources)
    _validate_target(save_dir, name, overwrite)
    was_there = save_dir.exists()
    try:
        with publish_directory(save_dir / name, overwrite=overwrite) as partial_dir:
            writer = CheckpointWriter(partial_dir)
            try:
                yield writer
            finally:
                writer.close()
            if not writer.is_committed:
                raise ValueError(f"{save_dir / name}: the block ended without commit()")
            write_hashes(partial_dir, writer.hashes)
    except BaseException:
        if not was_there:
            with suppress(OSError):
                save_dir.rmdir()  # other files in it are not ours
        raise
    # Last: the tracker must never name a folder that is not there.
    _write_tracker(save_dir, iteration, overwrite)


def _validate_target(save_dir: Path, name: str, overwrite: bool) -> None:
    if overwrite:
        return
    if (save_dir / name).exists():
        raise ConversionError(
            f"{save_dir / name}: target must not exist yet. Choose another --save, or pass --overwrite."
        )
    tracked = read_tracker(save_dir)
    if name == RELEASE and tracked is not None:
        raise ConversionError(
            f"{save_dir / LATEST_FILE}: must not point to a training run's checkpoint yet, got {str(tracked)!r}: the "
            "run would start anew from the imported weights. Choose another --save, or pass --overwrite."
        )


def _write_tracker(save_dir: Path, iteration: int | None, overwrite: bool) -> None:
    tracked = read_tracker(save_dir)
    is_later = isinstance(tracked, int) and iteration is not None and tracked > iteration
    if is_later and not overwrite:
        return
    publish_files({save_dir / LATEST_FILE: RELEASE if iteration is None else str(iteration)})


def _own_storage(tensor: Tensor) -> Tensor:
    """The same elements as a contiguous tensor whose storage holds nothing else, in the same memory where possible.

    torch.save writes the whole storage of what it is given.
    """
    contiguous = tensor.detach().contiguous()
    if contiguous.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    if contiguous.untyped_storage().nbytes() == contiguous.nbytes:
        return contiguous
    flat = contiguous.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(flat, dtype=tensor.dtype).view(tensor.shape)


def _is_covered(declared: _Declared) -> bool:
    """Whether the boxes are the whole tensor, counted: they lie inside it and no two start at one place."""
    num_written = sum(math.prod(sizes) for sizes in declared.chunks.values())
    return num_written == math.prod(declared.shape) and bool(declared.chunks)
