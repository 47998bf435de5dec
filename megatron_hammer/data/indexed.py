"""Megatron's indexed dataset, `<prefix>.bin` and `<prefix>.idx`, in numpy alone: no torch, no megatron.

.bin: the token ids of every sequence, one after another, with nothing between them.
.idx: magic (9 bytes), version (u64), dtype code (u8), number of sequences S (u64), length D of the document index
(u64); then lengths int32[S], byte offsets into .bin int64[S], document index int64[D] (document d holds the sequences
from entry d up to entry d + 1; the first entry is 0), and in multimodal data sets a mode int8[S].
Source: megatron/core/datasets/indexed_dataset.py; byte equality with it is pinned by tests/unit/data/test_indexed.py.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megatron_hammer.data.atomic_files import cannot_write, partial_path
from megatron_hammer.errors import DataError

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_VERSION = 1
IDX_HEADER_BYTES = 34
DTYPE_BY_CODE: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
SCAN_CHUNK_TOKENS = 1 << 24


def select_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron stores this vocabulary in: uint16 under 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")  # not with_suffix: a prefix may contain dots


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """What a .bin/.idx pair holds, read from its headers; the arrays are mapped from the files on first use."""

    prefix: Path
    dtype: np.dtype
    num_documents: int
    num_sequences: int
    num_tokens: int

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence: [num_sequences] int32, memory mapped."""
        return self._map_index(np.dtype(np.int32), self.num_sequences, IDX_HEADER_BYTES)

    @cached_property
    def document_index(self) -> np.ndarray:
        """First sequence of each document, and the end of the last: [num_documents + 1] int64, memory mapped."""
        return self._map_index(np.dtype(np.int64), self.num_documents + 1, IDX_HEADER_BYTES + 12 * self.num_sequences)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Every token id: [num_tokens], memory mapped."""
        if self.num_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")

    @cached_property
    def max_token_id(self) -> int:
        """The largest id, or -1 without tokens; reads the whole .bin once."""
        starts = range(0, self.num_tokens, SCAN_CHUNK_TOKENS)
        return max((int(self.tokens[start : start + SCAN_CHUNK_TOKENS].max()) for start in starts), default=-1)

    def _map_index(self, dtype: np.dtype, count: int, offset_bytes: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(idx_path(self.prefix), dtype=dtype, mode="r", offset=offset_bytes, shape=(count,))


def read_index(prefix: str | Path) -> IndexSummary:
    """Read what the pair holds and check that the two files belong together; cost does not grow with the data.

    Raises DataError if a file is missing, if the .idx is not an index or is truncated, or if the .bin does not have
    exactly the bytes that the .idx accounts for.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise DataError(
                f"{path}: file does not exist. Pass the prefix of a .bin/.idx pair without its suffix, "
                "or write the pair with tools/preprocess_data.py."
            )
    dtype, num_sequences, document_index_length = _read_header(idx_path(prefix))
    num_tokens = _read_num_tokens(idx_path(prefix), dtype, num_sequences, document_index_length)
    expected_bytes = num_tokens * dtype.itemsize
    actual_bytes = bin_path(prefix).stat().st_size
    if actual_bytes != expected_bytes:
        raise DataError(
            f"{bin_path(prefix)}: size must be {expected_bytes} bytes ({num_tokens} tokens of {dtype.itemsize} bytes "
            f"in the .idx), got {actual_bytes}. The pair is truncated or mixed; preprocess or copy it again."
        )
    return IndexSummary(
        prefix=Path(prefix),
        dtype=dtype,
        num_documents=document_index_length - 1,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
    )


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of sequences and length of the document index, after checking magic, version and size."""
    with open(path, "rb") as file:
        header = file.read(IDX_HEADER_BYTES)
    if not header.startswith(IDX_MAGIC):
        raise DataError(
            f"{path}: file must start with {IDX_MAGIC!r}, got {header[: len(IDX_MAGIC)]!r}. "
            "It is not an index of Megatron's; preprocess the corpus again."
        )
    if len(header) < IDX_HEADER_BYTES:
        raise _truncated_index(path, f"at least {IDX_HEADER_BYTES}", len(header))
    version, code, num_sequences, document_index_length = struct.unpack("<QBQQ", header[len(IDX_MAGIC) :])
    if version != IDX_VERSION or code not in DTYPE_BY_CODE or document_index_length < 1:
        raise DataError(
            f"{path}: header must have version {IDX_VERSION}, a dtype code of 1 to 8 and a document index, "
            f"got version={version}, dtype code={code}, document index length={document_index_length}. "
            "Preprocess the corpus again."
        )
    expected_bytes = IDX_HEADER_BYTES + 12 * num_sequences + 8 * document_index_length
    actual_bytes = path.stat().st_size
    if actual_bytes not in (expected_bytes, expected_bytes + num_sequences):  # the second: multimodal, with modes
        raise _truncated_index(path, str(expected_bytes), actual_bytes)
    return DTYPE_BY_CODE[code], num_sequences, document_index_length


def _read_num_tokens(path: Path, dtype: np.dtype, num_sequences: int, document_index_length: int) -> int:
    """Return where the last sequence ends, in tokens, after checking that the document index ends there too."""
    with open(path, "rb") as file:
        last_length = last_offset_bytes = 0
        if num_sequences:
            file.seek(IDX_HEADER_BYTES + 4 * (num_sequences - 1))
            (last_length,) = struct.unpack("<i", file.read(4))
            file.seek(IDX_HEADER_BYTES + 4 * num_sequences + 8 * (num_sequences - 1))
            (last_offset_bytes,) = struct.unpack("<q", file.read(8))
        file.seek(IDX_HEADER_BYTES + 12 * num_sequences + 8 * (document_index_length - 1))
        (last_document_end,) = struct.unpack("<q", file.read(8))
    if last_document_end != num_sequences or last_length < 0 or last_offset_bytes % dtype.itemsize:
        raise DataError(
            f"{path}: document index must end at sequence {num_sequences}, got {last_document_end}. "
            "The file is damaged; preprocess the corpus again."
        )
    return last_offset_bytes // dtype.itemsize + last_length


def _truncated_index(path: Path, expected: str, actual_bytes: int) -> DataError:
    return DataError(
        f"{path}: size must be {expected} bytes, got {actual_bytes}. "
        "The index is truncated; preprocess or copy it again."
    )


class IndexedWriter:
    """Write a pair as a stream: ids go to `<prefix>.bin.partial` at once, the index is written by `finish`.

    `publish` gives both files their names; until then nothing that looks like a data set exists. As a context manager
    it finishes and publishes on success, and removes what it wrote on an exception.
    Memory: 12 bytes a document. Raises DataError where the files cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self._sequence_lengths = array("i")
        self._document_index = array("q", [0])
        self._largest_id = int(np.iinfo(self.dtype).max)
        self._is_finished = self._is_published = False
        self._partial_bin_path = partial_path(bin_path(prefix))
        self._partial_idx_path = partial_path(idx_path(prefix))
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin_file = open(self._partial_bin_path, "wb")  # noqa: SIM115 (closed by finish or abort)
        except OSError as error:
            raise cannot_write(self._partial_bin_path, error) from error

    @property
    def num_documents(self) -> int:
        return len(self._document_index) - 1

    def add_document(self, ids: np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
        """Add one document of one sequence, or of several whose lengths add up to `ids`: [num_tokens] integer.

        A document without ids becomes one without sequences, as in Megatron-LM's tool.
        """
        if sequence_lengths is None:
            sequence_lengths = (len(ids),) if len(ids) else ()
        if sum(sequence_lengths) != len(ids):
            raise ValueError(f"sequence_lengths add up to {sum(sequence_lengths)}, but there are {len(ids)} ids")
        self._write_ids(ids)
        self._sequence_lengths.extend(sequence_lengths)
        self._document_index.append(len(self._sequence_lengths))

    def add_documents(self, ids: np.ndarray, document_lengths: np.ndarray) -> None:
        """Add many documents of one sequence each (none where the length is 0): ids [sum of lengths], lengths [n]."""
        if int(document_lengths.sum()) != len(ids):
            raise ValueError(f"document_lengths add up to {document_lengths.sum()}, but there are {len(ids)} ids")
        self._write_ids(ids)
        ends = len(self._sequence_lengths) + np.cumsum(document_lengths > 0)
        self._document_index.frombytes(ends.astype(np.int64).tobytes())
        self._sequence_lengths.frombytes(document_lengths[document_lengths > 0].astype(np.intc).tobytes())

    def finish(self) -> None:
        """Write the index and close both files, still under their .partial names."""
        try:
            self._bin_file.flush()
            os.fsync(self._bin_file.fileno())
            self._bin_file.close()
        except OSError as error:
            raise cannot_write(self._partial_bin_path, error) from error
        try:
            self._write_index()
        except OSError as error:
            raise cannot_write(self._partial_idx_path, error) from error
        self._is_finished = True

    def publish(self) -> None:
        """Give the files their names; an older pair of the same name is replaced.

        The old .idx goes first and the new one comes last: a crash in between leaves no pair that opens.
        """
        try:
            idx_path(self.prefix).unlink(missing_ok=True)
            self._partial_bin_path.replace(bin_path(self.prefix))
            self._partial_idx_path.replace(idx_path(self.prefix))
        except OSError as error:
            raise cannot_write(bin_path(self.prefix), error) from error
        self._is_published = True

    def abort(self) -> None:
        """Remove what was written under .partial names; does nothing after `publish`."""
        if not self._is_published:
            with suppress(OSError):  # on a full disk, closing fails once more
                self._bin_file.close()
            self._partial_bin_path.unlink(missing_ok=True)
            self._partial_idx_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and not self._is_published:
            try:
                if not self._is_finished:
                    self.finish()
                self.publish()
            finally:
                self.abort()
        else:
            self.abort()

    def _write_ids(self, ids: np.ndarray) -> None:
        if len(ids) and ids.dtype != self.dtype and not 0 <= int(ids.min()) <= int(ids.max()) <= self._largest_id:
            raise ValueError(f"token ids must lie in 0..{self._largest_id}, got {ids.min()}..{ids.max()}")
        try:
            self._bin_file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        except OSError as error:
            raise cannot_write(self._partial_bin_path, error) from error
        self.num_tokens += len(ids)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._sequence_lengths, dtype=np.int32)
        offsets_bytes = np.zeros(len(lengths), dtype=np.int64)
        if len(lengths):
            np.cumsum(lengths[:-1], dtype=np.int64, out=offsets_bytes[1:])
            offsets_bytes *= self.dtype.itemsize
        with open(self._partial_idx_path, "wb") as file:
            file.write(IDX_MAGIC)
            code = CODE_BY_DTYPE[self.dtype]
            file.write(struct.pack("<QBQQ", IDX_VERSION, code, len(lengths), len(self._document_index)))
            file.write(lengths.data)
            file.write(offsets_bytes.data)
            file.write(self._document_index)
            file.flush()
            os.fsync(file.fileno())
