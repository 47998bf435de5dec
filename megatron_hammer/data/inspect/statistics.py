"""What an indexed pair holds: lengths, token frequencies and duplicates, from one pass over its .bin.

Memory: 16 bytes per document for lengths and hashes (up to twice that while they are sorted), 8 bytes per id of the
vocabulary, and one chunk of the .bin (or its largest document). Integrity is checked by verify_pair.py;
document_text.py shows the text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_hammer.data.indexed.documents import Documents, read_pair_documents
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.errors import DataError

CHUNK_BYTES = 16 << 20
# Far above every vocabulary: a damaged id must not allocate gigabytes of counters.
MAX_VOCAB_SIZE = 1 << 24
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthSummary:
    """Tokens of a document over all documents, those without tokens included; quantiles are lengths that occur."""

    minimum: int
    median: int
    mean: float
    p90: int
    p99: int
    maximum: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateSummary:
    """Documents whose ids are those of an earlier one, and the tokens in them; empty documents do not count.

    Documents are compared by 64 bits of BLAKE2b: among 100 million, a false duplicate has a chance of 0.03 %.
    """

    num_duplicates: int
    num_duplicate_tokens: int
    num_texts_repeated: int
    most_copies: int


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """What one pass finds.

    lengths: tokens of each document, int64 [num_documents]; digests: of its ids, uint64 [num_documents];
    token_counts: occurrences of each id, int64 [ids].
    """

    index: IndexSummary
    lengths: np.ndarray
    digests: np.ndarray
    token_counts: np.ndarray
    duplicates: DuplicateSummary

    @property
    def num_empty_documents(self) -> int:
        return int((self.lengths == 0).sum())

    @property
    def num_unused_ids(self) -> int:
        """Ids that never occur, of the vocabulary where it is known, else of those up to the largest that does."""
        return int((self.token_counts == 0).sum())

    def select_frequent_ids(self, count: int) -> list[tuple[int, int]]:
        """Return the most frequent ids with how often each occurs, the smaller id first among equals."""
        # The last key decides first: by count, then by id.
        order = np.lexsort((np.arange(len(self.token_counts)), -self.token_counts))[:count]
        return [(int(token_id), int(self.token_counts[token_id])) for token_id in order if self.token_counts[token_id]]


def inspect_pair(
    index: IndexSummary,
    *,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done_tokens, total_tokens: None,
) -> PairStatistics:
    """Read the pair once and count; vocab_size: ids must be below it.

    on_progress: gets the tokens read so far, of all.
    Raises DataError if the index contradicts itself, or the .bin holds what cannot be token ids.
    """
    if not np.issubdtype(index.dtype, np.integer):
        raise DataError(
            f"{index.idx_path}: token ids must be integers, got dtype={index.dtype}. "
            "This pair does not hold text; pass another."
        )
    lengths = np.empty(index.num_documents, dtype=np.int64)
    digests = np.empty(index.num_documents, dtype=np.uint64)
    token_counts = np.zeros(vocab_size or 0, dtype=np.int64)
    num_documents = num_tokens = 0
    for documents in read_pair_documents(index, chunk_bytes=CHUNK_BYTES):
        # Into arrays of the known final size: a list of Python numbers would take several times the memory.
        here = slice(num_documents, num_documents + len(documents))
        lengths[here] = documents.token_ends - documents.token_starts
        digests[here] = hash_documents(documents)
        token_counts = _count_ids(index, documents.ids, token_counts, vocab_size)
        num_documents += len(documents)
        num_tokens += len(documents.ids)
        on_progress(num_tokens, index.num_tokens)
    return PairStatistics(
        index=index,
        lengths=lengths,
        digests=digests,
        token_counts=token_counts,
        duplicates=count_duplicates(digests, lengths),
    )


def hash_documents(documents: Documents) -> np.ndarray:
    """Return a hash of 64 bits of the ids of each document: uint64 [num_documents]."""
    ids = memoryview(np.ascontiguousarray(documents.ids)).cast("B")
    width = documents.ids.itemsize
    bounds = zip((documents.token_starts * width).tolist(), (documents.token_ends * width).tolist(), strict=True)
    digests = b"".join(hashlib.blake2b(ids[start:end], digest_size=8).digest() for start, end in bounds)
    return np.frombuffer(digests, dtype=np.uint64)


def _count_ids(index: IndexSummary, ids: np.ndarray, counts: np.ndarray, vocab_size: int | None) -> np.ndarray:
    if not len(ids):
        return counts
    smallest, largest = int(ids.min()), int(ids.max())
    # bincount allocates one counter per id up to the largest.
    limit = vocab_size or MAX_VOCAB_SIZE
    if smallest < 0 or largest >= limit:
        bad_id = smallest if smallest < 0 else largest
        raise DataError(
            f"{index.bin_path}: token ids must lie in 0..{limit - 1}, got id={bad_id}. "
            "It is damaged or was made with another tokenizer; check it with --verify."
        )
    here = np.bincount(ids, minlength=len(counts))
    here[: len(counts)] += counts
    return here


def count_duplicates(digests: np.ndarray, lengths: np.ndarray) -> DuplicateSummary:
    """Count documents that repeat an earlier one: digests uint64 [n], lengths int64 [n] in the order of the pair."""
    # All empty documents have the same ids, and are counted by themselves.
    is_text = lengths > 0
    digests, lengths = digests[is_text], lengths[is_text]
    _, first_indices, copies = np.unique(digests, return_index=True, return_counts=True)
    return DuplicateSummary(
        num_duplicates=len(digests) - len(first_indices),
        num_duplicate_tokens=int(lengths.sum() - lengths[first_indices].sum()),
        num_texts_repeated=int((copies > 1).sum()),
        most_copies=int(copies.max(initial=0)),
    )


def count_common_documents(statistics: PairStatistics, others: PairStatistics) -> int:
    """Count the documents with tokens whose ids are those of some document of another pair of the same dtype."""
    is_common = np.isin(statistics.digests, others.digests[others.lengths > 0])
    return int((is_common & (statistics.lengths > 0)).sum())


def summarise_lengths(lengths: np.ndarray) -> LengthSummary | None:
    """Return the figures of the lengths, int64 [n]; None where there are no documents."""
    if not len(lengths):
        return None
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    named = {name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)}
    return LengthSummary(minimum=int(lengths.min()), mean=float(lengths.mean()), maximum=int(lengths.max()), **named)
