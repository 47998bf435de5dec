"""Write Megatron's indexed dataset as a stream, in constant memory; a killed run can continue where it stopped."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np

from megatron_hammer.data.indexed.index_format import (
    DOCUMENT_BYTES,
    IDX_HEADER_BYTES,
    LENGTH_BYTES,
    bin_path,
    encode_header,
    idx_path,
)
from megatron_hammer.errors import DataError, OutputError
from megatron_hammer.files.publish import cannot_write, longest_partial_name, partial_path

# Larger than Python's 8 KiB: one system call per megabyte, whatever the size of a document.
BUFFER_BYTES = 1 << 20
INDEX_CHUNK_ENTRIES = 1 << 20
LONGEST_NAME_BYTES = 255  # of a file, on the usual file systems
# Lengths are int32 in the .idx, so a longer sequence cannot be stored.
LARGEST_LENGTH = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True)
class WriterState:
    """How much of a pair is on disk: what a later `IndexedWriter` needs to continue."""

    num_tokens: int
    num_sequences: int
    num_documents: int


def _refuse_long_name(prefix: Path) -> None:
    """Raise OutputError where a later file of the pair could not be made: the manifest comes last, after all work."""
    longest = longest_partial_name(f"{prefix.name}.manifest.json")
    if len(os.fsencode(longest)) > LONGEST_NAME_BYTES:
        raise OutputError(
            f"{prefix}: {longest} must have at most {LONGEST_NAME_BYTES} bytes, got {len(os.fsencode(longest))}. "
            "Choose a shorter output prefix."
        )


def remove_partial_files(prefix: str | Path) -> None:
    """Remove whatever a writer of this pair has left under .partial names."""
    for name in ("bin", "idx", "lengths", "documents"):
        partial_path(f"{prefix}.{name}").unlink(missing_ok=True)


class IndexedWriter:
    """Write a pair as a stream; `finish` assembles the index, and `publish` gives both files their names.

    Until then everything lies in `<prefix>.bin.partial`, `<prefix>.lengths.partial` (one int32 per sequence) and
    `<prefix>.documents.partial` (one int64 per document), so memory is constant and an unfinished pair is never
    mistaken for a data set. As a context manager it finishes and publishes on success, and removes what it wrote on an
    exception; after `close` it does neither. Raises OutputError if the files cannot be written.

    To survive a kill: store what `sync` returns, the last time directly before `publish`, and pass it as `resume_from`.
    Then what an earlier writer left is cut to that state: what was written later is dropped. A pair whose publishing
    was under way is taken back, and one that was published stays as it is: `finish` and `publish` have nothing left to
    do. Raises DataError, and changes nothing, if a file is missing or shorter.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, resume_from: WriterState | None = None):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = resume_from.num_tokens if resume_from else 0
        self.num_sequences = resume_from.num_sequences if resume_from else 0
        self.num_documents = resume_from.num_documents if resume_from else 0
        self._largest_id = int(np.iinfo(self.dtype).max)
        self._is_open = self._is_finished = self._is_published = self._is_kept = False
        _refuse_long_name(self.prefix)
        self._partial_bin_path = partial_path(bin_path(prefix))
        self._partial_idx_path = partial_path(idx_path(prefix))
        self._lengths_path = partial_path(f"{prefix}.lengths")
        self._documents_path = partial_path(f"{prefix}.documents")
        if resume_from is not None:
            self._reopen(resume_from)
            return
        try:
            self._open("wb")
        except BaseException:  # Ctrl-C: the caller has no writer yet to call `abort` on
            with suppress(OSError):
                self.abort()
            raise

    @property
    def state(self) -> WriterState:
        """What has been added so far; only that of `sync` is on disk."""
        return WriterState(self.num_tokens, self.num_sequences, self.num_documents)

    @property
    def num_bytes_in_bin(self) -> int:
        """How much of the .bin has been passed to the operating system; the rest is in this process's buffer."""
        return os.lseek(self._bin_file.fileno(), 0, os.SEEK_CUR)

    def add_documents(
        self, ids: np.ndarray, sequence_lengths: np.ndarray, sequences_per_document: np.ndarray | None = None
    ) -> None:
        """Add documents: ids [sum of sequence_lengths], sequence_lengths [num_sequences] integer.

        sequences_per_document: [num_documents]; without it, one sequence per document, and none where the length is 0,
        as in Megatron-LM's tool.
        """
        if int(sequence_lengths.sum()) != len(ids):
            raise ValueError(f"sequence_lengths add up to {sequence_lengths.sum()}, but there are {len(ids)} ids")
        if sequences_per_document is None:
            sequences_per_document = sequence_lengths > 0
            sequence_lengths = sequence_lengths[sequences_per_document]
        document_ends = self.num_sequences + np.cumsum(sequences_per_document, dtype=np.int64)
        num_sequences = int(document_ends[-1]) - self.num_sequences if len(document_ends) else 0
        if num_sequences != len(sequence_lengths):
            raise ValueError(
                f"sequences_per_document add up to {num_sequences}, but there are {len(sequence_lengths)} sequences"
            )
        if num_sequences and not 0 <= int(sequence_lengths.min()) <= int(sequence_lengths.max()) <= LARGEST_LENGTH:
            raise ValueError(
                f"sequence_lengths must lie in 0..{LARGEST_LENGTH}, "
                f"got {sequence_lengths.min()}..{sequence_lengths.max()}"
            )
        self._write_ids(ids)
        self.num_sequences += num_sequences
        self.num_documents += len(document_ends)
        self._write(self._lengths_file, np.ascontiguousarray(sequence_lengths, dtype=np.int32).data)
        self._write(self._documents_file, document_ends.data)

    def sync(self) -> WriterState:
        """Bring everything to the disk and return the state that a later writer may resume from."""
        for file in self._files():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(Path(file.name), error) from error
        return self.state

    def close(self) -> None:
        """Close the files and keep them under their .partial names, for a later writer or `finish`."""
        if self._is_open:
            self.sync()
            self._close_files()
        # From here on the context manager leaves the files alone.
        self._is_kept = True

    def finish(self) -> None:
        """Write the index and close all files, still under .partial names; may be repeated by a resumed writer."""
        if self._is_published:
            return
        if self._is_open:
            self.sync()
            self._close_files()
        try:
            self._write_index()
        except OSError as error:
            raise cannot_write(self._partial_idx_path, error) from error
        self._is_finished = True

    def publish(self) -> None:
        """Give the files their names; an older pair of the same name is replaced.

        The old .idx goes first and the new one comes last: a crash in between leaves no pair that opens. What a resumed
        writer needs to take this back is removed only after that.
        """
        if self._is_published:
            return
        try:
            idx_path(self.prefix).unlink(missing_ok=True)
            self._partial_bin_path.replace(bin_path(self.prefix))
            self._partial_idx_path.replace(idx_path(self.prefix))
        except OSError as error:
            raise cannot_write(bin_path(self.prefix), error) from error
        self._is_published = True
        self._remove_spools()

    def abort(self) -> None:
        """Remove what was written under .partial names; does nothing after `publish`."""
        if not self._is_published:
            if self._is_open:
                self._close_files()
            remove_partial_files(self.prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_kept:
            return
        if error is None and not self._is_published:
            try:
                if not self._is_finished:
                    self.finish()
                self.publish()
            finally:
                self.abort()
        else:
            self.abort()

    def _files(self) -> tuple[BinaryIO, BinaryIO, BinaryIO]:
        return self._bin_file, self._lengths_file, self._documents_file

    def _open(self, mode: Literal["wb", "ab"]) -> None:
        """Open the three streams, to start them (wb) or to append to them (ab)."""
        path = self._partial_bin_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._bin_file = open(path, mode, buffering=BUFFER_BYTES)  # noqa: SIM115 (closed by close, finish, abort)
            self._lengths_file = open(self._lengths_path, mode, buffering=BUFFER_BYTES)  # noqa: SIM115
            self._documents_file = open(self._documents_path, mode, buffering=BUFFER_BYTES)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(path, error) from error
        self._is_open = True

    def _close_files(self) -> None:
        for file in self._files():
            with suppress(OSError):  # on a full disk, closing fails once more
                file.close()
        self._is_open = False

    def _remove_spools(self) -> None:
        self._lengths_path.unlink(missing_ok=True)
        self._documents_path.unlink(missing_ok=True)

    def _reopen(self, state: WriterState) -> None:
        if self._is_published_already():
            self._is_published = True
            self._remove_spools()
            return
        sizes_bytes = {
            self._partial_bin_path: state.num_tokens * self.dtype.itemsize,
            self._lengths_path: state.num_sequences * LENGTH_BYTES,
            self._documents_path: state.num_documents * DOCUMENT_BYTES,
        }
        for path, size_bytes in sizes_bytes.items():
            actual_bytes = path.stat().st_size if path.is_file() else None
            if actual_bytes is None or actual_bytes < size_bytes:
                found = "no file" if actual_bytes is None else f"{actual_bytes} bytes"
                raise DataError(
                    f"{path}: file must hold the first {size_bytes} bytes of the run to be continued, got {found}. "
                    "Remove the partial files and start again."
                )
        self._open("ab")
        for file, size_bytes in zip(self._files(), sizes_bytes.values(), strict=True):
            # What lies beyond was written after the state was taken.
            file.truncate(size_bytes)

    def _is_published_already(self) -> bool:
        """Whether the pair of this state has its names; if only its .bin has, that gets its partial name back.

        `publish` removes an older .idx while the partial .bin is still there. So without a partial .bin, a .bin of the
        right size is ours, and so is an .idx beside it.
        """
        own_bin_path, own_idx_path = bin_path(self.prefix), idx_path(self.prefix)
        if self._partial_bin_path.exists() or not own_bin_path.is_file():
            return False
        if own_bin_path.stat().st_size != self.num_tokens * self.dtype.itemsize:
            return False
        if not own_idx_path.exists():
            own_bin_path.replace(self._partial_bin_path)
            return False
        with open(own_idx_path, "rb") as file:
            return file.read(IDX_HEADER_BYTES) == encode_header(self.dtype, self.num_sequences, self.num_documents)

    def _write_ids(self, ids: np.ndarray) -> None:
        # The conversion below would silently wrap an id that is too large for the dtype.
        if len(ids) and ids.dtype != self.dtype and not 0 <= int(ids.min()) <= int(ids.max()) <= self._largest_id:
            raise ValueError(f"token ids must lie in 0..{self._largest_id}, got {ids.min()}..{ids.max()}")
        self._write(self._bin_file, np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.num_tokens += len(ids)

    def _write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        try:
            file.write(content)
        except OSError as error:
            raise cannot_write(Path(file.name), error) from error

    def _write_index(self) -> None:
        with open(self._partial_idx_path, "wb") as file:
            # The order of the parts is in index_format.py: header, lengths, offsets, document index.
            file.write(encode_header(self.dtype, self.num_sequences, self.num_documents))
            with open(self._lengths_path, "rb") as lengths_file:
                shutil.copyfileobj(lengths_file, file, BUFFER_BYTES)
                lengths_file.seek(0)
                self._write_offsets(lengths_file, file)
            file.write(bytes(DOCUMENT_BYTES))  # the document index begins with 0; the spool has the ends only
            with open(self._documents_path, "rb") as documents_file:
                shutil.copyfileobj(documents_file, file, BUFFER_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def _write_offsets(self, lengths_file: BinaryIO, file: BinaryIO) -> None:
        """Write the byte offset of each sequence into the .bin: the sum of the lengths before it."""
        end_bytes = 0
        while chunk := lengths_file.read(INDEX_CHUNK_ENTRIES * LENGTH_BYTES):
            # int64 before the product: a length in bytes may exceed int32.
            lengths_bytes = np.frombuffer(chunk, dtype=np.int32).astype(np.int64) * self.dtype.itemsize
            ends_bytes = end_bytes + np.cumsum(lengths_bytes)
            file.write((ends_bytes - lengths_bytes).data)
            end_bytes = int(ends_bytes[-1])
