"""Whole documents of a pair, many at once: read from front to end, and reordered without touching their sequences."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_hammer.data.indexed.index_format import (
    DOCUMENT_BYTES,
    IDX_HEADER_BYTES,
    LENGTH_BYTES,
    OFFSET_BYTES,
    read_array,
)
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.errors import DataError

# Entries of the index that are read together: 512 KiB of document ends.
DOCUMENTS_AT_ONCE = 1 << 16
DOCUMENT_OVERHEAD_BYTES = 200  # per document in a chunk, without its ids: its numbers, and the slice that copies it


@dataclass(frozen=True)
class Documents:
    """Consecutive documents.

    ids [sum of sequence_lengths], sequence_lengths [num_sequences] int32, sequences_per_document [num_documents] int64.
    """

    ids: np.ndarray
    sequence_lengths: np.ndarray
    sequences_per_document: np.ndarray

    def __len__(self) -> int:
        return len(self.sequences_per_document)

    @cached_property
    def sequence_ends(self) -> np.ndarray:
        """Where each document ends in `sequence_lengths`: [num_documents] int64."""
        return np.cumsum(self.sequences_per_document)

    @cached_property
    def token_ends(self) -> np.ndarray:
        """Where each document ends in `ids`: [num_documents] int64."""
        # One entry more, 0 in front: a document without sequences ends where the one before it ends.
        ends_of_sequences = np.zeros(len(self.sequence_lengths) + 1, dtype=np.int64)
        np.cumsum(self.sequence_lengths, out=ends_of_sequences[1:])
        return ends_of_sequences[self.sequence_ends]

    @cached_property
    def token_starts(self) -> np.ndarray:
        """Where each document starts in `ids`: [num_documents] int64."""
        return np.concatenate(([0], self.token_ends[:-1]))

    def estimate_bytes(self) -> np.ndarray:
        """Memory that each document takes while it is copied: [num_documents] int64."""
        ids_bytes = (self.token_ends - self.token_starts) * self.ids.itemsize
        return ids_bytes + self.sequences_per_document * LENGTH_BYTES + DOCUMENT_OVERHEAD_BYTES

    def select(self, chosen: np.ndarray) -> "Documents":
        """Return the documents with these numbers, in this order; chosen: [n] int64, at least one."""
        starts, ends = self.token_starts[chosen].tolist(), self.token_ends[chosen].tolist()
        slices = [self.ids[start:end] for start, end in zip(starts, ends, strict=True)]
        counts = self.sequences_per_document[chosen]
        first_sequences = self.sequence_ends[chosen] - counts
        within_document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sequences = np.repeat(first_sequences, counts) + within_document
        ids = np.concatenate(slices) if len(slices) > 1 else slices[0]  # one large document is not copied
        return Documents(ids, self.sequence_lengths[sequences], counts)


def bound_memory(costs_bytes: np.ndarray, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of consecutive ranges that cost at most `chunk_bytes` each, or are one item: costs [n]."""
    ends_bytes = np.cumsum(costs_bytes)
    start = 0
    while start < len(ends_bytes):
        before_bytes = int(ends_bytes[start - 1]) if start else 0
        # At least one item, or a range could stay empty for ever.
        stop = max(start + 1, int(np.searchsorted(ends_bytes, before_bytes + chunk_bytes, side="right")))
        yield start, stop
        start = stop


def read_pair_documents(index: IndexSummary, *, chunk_bytes: int) -> Iterator[Documents]:
    """Yield all documents in order, as many at once as take `chunk_bytes` of memory, or one that takes more.

    Reads both files from front to end. Raises DataError if a length is negative or the document index decreases.
    """
    with open(index.bin_path, "rb") as bin_file:
        for lengths, counts in _read_document_index(index):
            # Without ids: the bounds of the documents are all that is needed to size the chunks.
            block = Documents(np.empty(0, index.dtype), lengths, counts)
            for start, stop in bound_memory(block.estimate_bytes(), chunk_bytes):
                first_sequence = int(block.sequence_ends[start] - counts[start])
                num_tokens = int(block.token_ends[stop - 1] - block.token_starts[start])
                yield Documents(
                    read_array(bin_file, index.dtype, num_tokens),
                    lengths[first_sequence : int(block.sequence_ends[stop - 1])],
                    counts[start:stop],
                )


def _read_document_index(index: IndexSummary) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sequence lengths, and the number of sequences of each document, of blocks of documents."""
    num_left, first_sequence = index.num_documents, 0
    # Two handles on one file: lengths and document index lie in different places, and both are read from front to end.
    with open(index.idx_path, "rb") as lengths_file, open(index.idx_path, "rb") as documents_file:
        lengths_file.seek(IDX_HEADER_BYTES)
        documents_file.seek(IDX_HEADER_BYTES + (LENGTH_BYTES + OFFSET_BYTES) * index.num_sequences + DOCUMENT_BYTES)
        while num_left:
            ends = read_array(documents_file, np.dtype(np.int64), min(num_left, DOCUMENTS_AT_ONCE))
            counts = np.diff(ends, prepend=first_sequence)
            if int(counts.min()) < 0 or int(ends[-1]) > index.num_sequences:
                raise DataError(
                    f"{index.idx_path}: document index must not decrease, nor pass the {index.num_sequences} "
                    f"sequences, got {first_sequence}..{ends.max()}. The file is damaged; preprocess the corpus again."
                )
            lengths = read_array(lengths_file, np.dtype(np.int32), int(ends[-1]) - first_sequence)
            if len(lengths) and int(lengths.min()) < 0:
                raise DataError(
                    f"{index.idx_path}: lengths must be at least 0, got {lengths.min()}. "
                    "The file is damaged; preprocess the corpus again."
                )
            yield lengths, counts
            num_left -= len(ends)
            first_sequence = int(ends[-1])
