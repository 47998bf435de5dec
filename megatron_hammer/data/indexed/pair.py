"""Read Megatron's indexed dataset in numpy alone: no torch, no megatron.

index_format.py says what the two files hold, and pair_writer.py writes them; both are reached from here.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_hammer.data.indexed.index_format import (
    DTYPE_BY_CODE,
    IDX_HEADER_BYTES,
    IDX_MAGIC,
    IDX_VERSION,
    bin_path,
    count_index_bytes,
    idx_path,
    select_dtype,
)
from megatron_hammer.data.indexed.pair_writer import IndexedWriter, WriterState
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import partial_path

__all__ = [
    "IndexSummary",
    "IndexedWriter",
    "WriterState",
    "bin_path",
    "idx_path",
    "read_index",
    "select_dtype",
]


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """What a .bin/.idx pair holds, read from its headers; the arrays are mapped from the files on first use."""

    bin_path: Path
    idx_path: Path
    dtype: np.dtype
    num_documents: int
    num_sequences: int
    num_tokens: int

    @property
    def has_modes(self) -> bool:
        """Whether the index ends with a mode for each sequence, as those of multimodal data sets do."""
        return self.num_sequences > 0 and self.idx_path.stat().st_size != count_index_bytes(
            self.num_sequences, self.num_documents
        )

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
        # mmap refuses an empty file.
        if self.num_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def _map_index(self, dtype: np.dtype, count: int, offset_bytes: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(self.idx_path, dtype=dtype, mode="r", offset=offset_bytes, shape=(count,))


def read_index(prefix: str | Path, *, is_partial: bool = False) -> IndexSummary:
    """Read what the pair holds and check that the two files belong together; cost does not grow with the data.

    is_partial: read the pair under its .partial names, as `IndexedWriter.finish` leaves it.
    Raises DataError if a file is missing, if the .idx is not an index or is truncated, or if the .bin does not have
    exactly the bytes that the .idx accounts for.
    """
    data_path, index_path = bin_path(prefix), idx_path(prefix)
    if is_partial:
        data_path, index_path = partial_path(data_path), partial_path(index_path)
    for path in (data_path, index_path):
        if not path.is_file():
            raise DataError(
                f"{path}: file does not exist. Pass the prefix of a .bin/.idx pair without its suffix, "
                "or write the pair with hammer preprocess-data."
            )
    dtype, num_sequences, document_index_length = read_index_header(index_path)
    num_tokens = _read_num_tokens(index_path, dtype, num_sequences, document_index_length)
    expected_bytes = num_tokens * dtype.itemsize
    actual_bytes = data_path.stat().st_size
    if actual_bytes != expected_bytes:
        raise DataError(
            f"{data_path}: size must be {expected_bytes} bytes ({num_tokens} tokens of {dtype.itemsize} bytes "
            f"in the .idx), got {actual_bytes}. The pair is truncated or mixed; preprocess or copy it again."
        )
    return IndexSummary(
        bin_path=data_path,
        idx_path=index_path,
        dtype=dtype,
        num_documents=document_index_length - 1,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
    )


def read_index_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of sequences and length of the document index of an .idx.

    Raises DataError unless magic and version are Megatron's and the file has the size that its header asks for.
    """
    with open(path, "rb") as file:
        header = file.read(IDX_HEADER_BYTES)
    if not header.startswith(IDX_MAGIC):
        raise DataError(
            f"{path}: file must start with {IDX_MAGIC!r}, got {header[: len(IDX_MAGIC)]!r}. "
            "It is not an index of Megatron's; preprocess the corpus again."
        )
    if len(header) < IDX_HEADER_BYTES:
        raise _index_of_wrong_size(path, IDX_HEADER_BYTES, len(header))
    version, code, num_sequences, document_index_length = struct.unpack("<QBQQ", header[len(IDX_MAGIC) :])
    if version != IDX_VERSION or code not in DTYPE_BY_CODE or document_index_length < 1:
        raise DataError(
            f"{path}: header must have version {IDX_VERSION}, a dtype code of 1 to 8 and a document index, "
            f"got version={version}, dtype code={code}, document index length={document_index_length}. "
            "Preprocess the corpus again."
        )
    expected_bytes = count_index_bytes(num_sequences, document_index_length - 1)
    actual_bytes = path.stat().st_size
    if actual_bytes not in (expected_bytes, expected_bytes + num_sequences):  # the second: multimodal, with modes
        raise _index_of_wrong_size(path, expected_bytes, actual_bytes)
    return DTYPE_BY_CODE[code], num_sequences, document_index_length


def _read_num_tokens(path: Path, dtype: np.dtype, num_sequences: int, document_index_length: int) -> int:
    """Return where the last sequence ends, in tokens, after checking that the document index ends there too."""
    with open(path, "rb") as file:
        # Three numbers at known places instead of the whole index: the cost does not grow with the data.
        last_length = last_offset_bytes = 0
        if num_sequences:
            file.seek(IDX_HEADER_BYTES + 4 * (num_sequences - 1))
            (last_length,) = struct.unpack("<i", file.read(4))
            file.seek(IDX_HEADER_BYTES + 4 * num_sequences + 8 * (num_sequences - 1))
            (last_offset_bytes,) = struct.unpack("<q", file.read(8))
        file.seek(IDX_HEADER_BYTES + 12 * num_sequences + 8 * (document_index_length - 1))
        (last_document_end,) = struct.unpack("<q", file.read(8))
    # A cheap sign of damage: the header may be right where the end of the file is not.
    if last_document_end != num_sequences or last_length < 0 or last_offset_bytes % dtype.itemsize:
        raise DataError(
            f"{path}: document index must end at sequence {num_sequences}, got {last_document_end}. "
            "The file is damaged; preprocess the corpus again."
        )
    return last_offset_bytes // dtype.itemsize + last_length


def _index_of_wrong_size(path: Path, expected_bytes: int, actual_bytes: int) -> DataError:
    at_least = "at least " if expected_bytes == IDX_HEADER_BYTES else ""
    cause = "is truncated" if actual_bytes < expected_bytes else "has bytes too many"
    return DataError(
        f"{path}: size must be {at_least}{expected_bytes} bytes, got {actual_bytes}. "
        f"The index {cause}; preprocess or copy it again."
    )
