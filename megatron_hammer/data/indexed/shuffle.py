"""Shuffle the documents of pairs that are larger than memory, with sequential reads and appends only.

Every document gets a random 64-bit key from its number and the seed, and the result is sorted by key: a uniform random
permutation that depends on the seed and the number of documents, and on nothing else. The keys' range is cut into
buckets; each document is appended to the file of its bucket, then each bucket is sorted in memory.
Not here: naming the result and removing the source, which is the caller's.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_hammer.data.indexed.documents import DOCUMENT_OVERHEAD_BYTES, Documents, bound_memory, read_pair_documents
from megatron_hammer.data.indexed.index_format import LENGTH_BYTES, read_array
from megatron_hammer.data.indexed.pair import IndexedWriter, IndexSummary
from megatron_hammer.files.publish import cannot_write

MIN_MEMORY_BYTES = 128 << 20
MAX_MEMORY_BYTES = 512 << 20
FEW_BUCKETS = 1024  # each append opens a file, so with many buckets the chunks should be larger
CHUNKS_IN_MEMORY = 4  # of the source at once; the rest is for their copies
WORDS_PER_COUNTER = 4  # Philox 4x64
# Keys and counts in one file: a bucket then has three files and not four.
DOCUMENT_RECORD = np.dtype([("key", np.uint64), ("num_sequences", np.int64)])
BUCKET_GLOB = "bucket-*"


def shuffle_pairs(
    sources: Sequence[IndexSummary],
    writers: Sequence[IndexedWriter],
    *,
    seed: int,
    work_dir: Path,
    max_memory_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> None:
    """Add the documents of each source to its writer in random order, the same order for all sources.

    sources: pairs of the same number of documents, read with `read_index`, also under their .partial names.
    seed: at least 0. work_dir: a folder for the buckets, as large as the largest source; what an earlier attempt left
    there is removed, and so is the folder in the end. max_memory_bytes: what is held at once, unless one document is
    larger. The result does not depend on it; the default is set by `select_memory_bytes`. on_progress: gets the bytes
    moved so far, of all that will be.
    Raises OutputError if the buckets cannot be written, and DataError if a source is damaged.
    """
    if len({source.num_documents for source in sources}) > 1:
        raise ValueError(f"sources must have the same number of documents, got {[s.num_documents for s in sources]}")
    # Every document is moved twice: into its bucket, and from there to the result.
    total_bytes = 2 * sum(source.num_tokens * source.dtype.itemsize for source in sources)
    done_bytes = 0

    def count(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        on_progress(done_bytes, total_bytes)

    for source, writer in zip(sources, writers, strict=True):
        memory_bytes = max_memory_bytes or select_memory_bytes([source])
        shuffle_documents(
            read_pair_documents(source, chunk_bytes=memory_bytes // CHUNKS_IN_MEMORY),
            writer,
            seed=seed,
            num_buckets=count_buckets([source], memory_bytes),
            work_dir=work_dir,
            max_memory_bytes=memory_bytes,
            on_moved=count,
        )


def shuffle_documents(
    documents: Iterable[Documents],
    writer: IndexedWriter,
    *,
    seed: int,
    num_buckets: int,
    work_dir: Path,
    max_memory_bytes: int,
    on_moved: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Add documents that come in chunks to the writer in random order; see `shuffle_pairs`.

    num_buckets: from `count_buckets`. on_moved: gets the bytes of every move, of which each document makes two.
    """
    buckets = _Buckets(work_dir, writer.dtype, num_buckets, max_memory_bytes)
    try:
        buckets.create()
        buckets.scatter(documents, seed, on_moved)
        buckets.append_to(writer, on_moved)
    finally:
        buckets.remove()


def draw_keys(seed: int, first_document: int, num_documents: int) -> np.ndarray:
    """Return the random keys of consecutive documents: [num_documents] uint64.

    Raw words of Philox: numpy guarantees that they never change, which it does not for its generators' methods.
    """
    # The generator counts in blocks of four words, so a start inside a block skips some.
    first_counter, num_skipped = divmod(first_document, WORDS_PER_COUNTER)
    words = np.random.Philox(key=seed, counter=first_counter).random_raw(num_skipped + num_documents)
    return words[num_skipped:]


def select_buckets(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return the bucket of each key: [n] int64 in 0..num_buckets - 1, never less for a larger key."""
    # The upper 32 bits times the number of buckets: a product of the whole key would overflow.
    return ((keys >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)


def select_memory_bytes(parts: Sequence[IndexSummary]) -> int:
    """Return how much memory keeps the buckets few: 128 MiB, and from 64 GiB of documents on up to 512 MiB."""
    # Twice, because a bucket holds half the memory on average.
    wanted_bytes = 2 * sum(map(_estimate_bytes, parts)) // FEW_BUCKETS
    return min(max(wanted_bytes, MIN_MEMORY_BYTES), MAX_MEMORY_BYTES)


def count_buckets(parts: Sequence[IndexSummary], max_memory_bytes: int) -> int:
    """Return into how many buckets the documents of all parts go, each at half the memory on average."""
    return -(-sum(map(_estimate_bytes, parts)) // max(max_memory_bytes // 2, 1)) or 1


def _estimate_bytes(part: IndexSummary) -> int:
    return (
        part.num_tokens * part.dtype.itemsize
        + part.num_sequences * LENGTH_BYTES
        + part.num_documents * DOCUMENT_OVERHEAD_BYTES
    )


class _Buckets:
    """Files of documents by range of keys; one file is open at a time, so there may be thousands."""

    def __init__(self, work_dir: Path, dtype: np.dtype, num_buckets: int, max_memory_bytes: int):
        self._work_dir = work_dir
        self._dtype = dtype
        self._num_buckets = num_buckets
        self._max_memory_bytes = max_memory_bytes

    def create(self) -> None:
        self.remove()
        try:
            self._work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._work_dir, error) from error

    def remove(self) -> None:
        if self._work_dir.is_dir():
            for path in self._work_dir.glob(BUCKET_GLOB):
                path.unlink()
            with suppress(OSError):  # it holds files that are not ours
                self._work_dir.rmdir()

    def scatter(self, chunks: Iterable[Documents], seed: int, on_moved: Callable[[int], None]) -> None:
        """Append each document to its bucket."""
        first_document = 0
        for documents in chunks:
            keys = draw_keys(seed, first_document, len(documents))
            first_document += len(documents)
            buckets = select_buckets(keys, self._num_buckets)
            order = np.argsort(buckets, kind="stable")
            used_buckets, starts = np.unique(buckets[order], return_index=True)
            # One append per bucket and chunk, because opening the files takes most of the time.
            for bucket, chosen in zip(used_buckets, np.split(order, starts[1:]), strict=True):
                self._append(int(bucket), documents.select(chosen), keys[chosen])
            on_moved(documents.ids.nbytes)

    def append_to(self, writer: IndexedWriter, on_moved: Callable[[int], None]) -> None:
        """Add the documents of one bucket after another to the writer, each bucket sorted by key."""
        for bucket in range(self._num_buckets):
            paths = self._paths(bucket)
            if paths[0].exists():
                self._append_bucket_to(writer, paths, on_moved)
                for path in paths:
                    path.unlink()

    def _append_bucket_to(
        self, writer: IndexedWriter, paths: tuple[Path, Path, Path], on_moved: Callable[[int], None]
    ) -> None:
        ids_path, lengths_path, records_path = paths
        records = _read_file(records_path, DOCUMENT_RECORD)
        lengths = _read_file(lengths_path, np.dtype(np.int32))
        documents = Documents(self._read_ids(ids_path), lengths, np.ascontiguousarray(records["num_sequences"]))
        # stable: two equal keys must come in the same order on every machine
        order = np.argsort(records["key"], kind="stable")
        for start, stop in bound_memory(documents.estimate_bytes()[order], self._max_memory_bytes // 8):
            piece = documents.select(order[start:stop])
            writer.add_documents(piece.ids, piece.sequence_lengths, piece.sequences_per_document)
            on_moved(piece.ids.nbytes)

    def _paths(self, bucket: int) -> tuple[Path, Path, Path]:
        ids_path, lengths_path, records_path = (
            self._work_dir / f"bucket-{bucket:06d}.{part}" for part in ("ids", "lengths", "documents")
        )
        return ids_path, lengths_path, records_path

    def _append(self, bucket: int, documents: Documents, keys: np.ndarray) -> None:
        records = np.empty(len(documents), DOCUMENT_RECORD)
        records["key"] = keys
        records["num_sequences"] = documents.sequences_per_document
        contents = (documents.ids, documents.sequence_lengths, records)
        for path, content in zip(self._paths(bucket), contents, strict=True):
            try:
                with open(path, "ab") as file:
                    file.write(content.data)
            except OSError as error:
                raise cannot_write(path, error) from error

    def _read_ids(self, path: Path) -> np.ndarray:
        """Return the ids in memory, or mapped where a large document makes the bucket larger than that."""
        if path.stat().st_size > self._max_memory_bytes:
            return np.memmap(path, self._dtype, mode="r")
        return _read_file(path, self._dtype)


def _read_file(path: Path, dtype: np.dtype) -> np.ndarray:
    with open(path, "rb") as file:
        return read_array(file, dtype, path.stat().st_size // dtype.itemsize)
