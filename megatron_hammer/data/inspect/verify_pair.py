"""Verify a pair by reading all of it, in constant memory.

`read_index` checks what the headers say and is quick; this reads every byte, and compares it with the manifest's hashes
where there are some. Without them, ids that were swapped for others of the vocabulary cannot be noticed.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.data.indexed.index_format import IDX_HEADER_BYTES, LENGTH_BYTES, OFFSET_BYTES, read_array
from megatron_hammer.data.indexed.manifest import Manifest, hash_file, manifest_path, read_manifest
from megatron_hammer.data.indexed.pair import bin_path, idx_path, read_index_header
from megatron_hammer.errors import DataError
from megatron_hammer.files.read import cannot_read

SCAN_CHUNK_BYTES = 8 << 20
SCAN_CHUNK_ENTRIES = 1 << 20
REMEDY = "preprocess or copy it again."


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedPair:
    """What was found; the pair is sound if there are no problems, each of them one sentence that names a file.

    has_hashes: whether the manifest's hashes were there to compare with.
    """

    has_hashes: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Index:
    """What the .idx holds; num_tokens is None where it contradicts itself."""

    dtype: np.dtype
    num_documents: int
    num_sequences: int
    num_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Ids:
    """What the .bin holds: its smallest and largest id (None without tokens), and its hash."""

    smallest: int | None
    largest: int | None
    sha256: str


def verify_pair(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> VerifiedPair:
    """Read a pair and its manifest whole and return every problem at once.

    vocab_size: ids must be below it; without it, below that of the manifest's tokenizer. on_progress: gets the bytes
    of the .bin read so far, of all. Raises DataError only if a file cannot be read.
    """
    own_bin_path, own_idx_path = bin_path(prefix), idx_path(prefix)
    manifest, problems = _read_manifest(prefix)
    problems += [
        f"{path}: file does not exist. Copy it beside the other one, or preprocess the corpus again."
        for path in (own_bin_path, own_idx_path)
        if not path.is_file()
    ]
    # A damaged or missing file does not end the check: the others are still verified, and all problems are reported.
    index = ids = None
    try:
        if own_idx_path.is_file():
            index, index_problems = _scan_index(own_idx_path)
            problems += index_problems
        if own_bin_path.is_file():
            problems += _find_size_problems(own_bin_path, index, manifest)
            dtype = index.dtype if index else np.dtype(manifest.dtype) if manifest else None
            # The type of the ids is named by the .idx. Where that is damaged, the manifest names it too.
            ids = _scan_ids(own_bin_path, dtype, on_progress)
            problems += _find_id_problems(own_bin_path, ids, vocab_size, manifest)
        if manifest is not None:
            problems += _find_count_problems(Path(prefix), manifest, index)
            problems += _find_hash_problems(Path(prefix), manifest, ids, problems)
    except OSError as error:
        raise cannot_read(error.filename, error) from error
    return VerifiedPair(
        has_hashes=manifest is not None and manifest.bin_sha256 is not None and manifest.idx_sha256 is not None,
        problems=tuple(problems),
    )


def _read_manifest(prefix: str | Path) -> tuple[Manifest | None, list[str]]:
    try:
        return read_manifest(prefix), []
    except DataError as error:
        return None, list(error.problems)


# --- .idx ------------------------------------------------------------------------------------------------------------


def _scan_index(path: Path) -> tuple[_Index | None, list[str]]:
    """Read the whole .idx; None if it is not an index or does not have the size that its header asks for."""
    try:
        dtype, num_sequences, document_index_length = read_index_header(path)
    except DataError as error:
        return None, list(error.problems)
    problems = []
    if not np.issubdtype(dtype, np.integer):
        problems.append(f"{path}: tokens must be integers, got dtype={dtype}. Preprocess the corpus again.")
    num_tokens, sequence_problems = _scan_sequences(path, dtype, num_sequences)
    problems += sequence_problems
    problems += _scan_document_index(path, num_sequences, document_index_length)
    return _Index(dtype, document_index_length - 1, num_sequences, num_tokens), problems


def _scan_sequences(path: Path, dtype: np.dtype, num_sequences: int) -> tuple[int | None, list[str]]:
    """Return the sum of the lengths, None if they are wrong; each offset must be the bytes of the lengths before it."""
    lengths = _read_in_chunks(path, np.dtype(np.int32), IDX_HEADER_BYTES, num_sequences)
    offsets = _read_in_chunks(path, np.dtype(np.int64), IDX_HEADER_BYTES + LENGTH_BYTES * num_sequences, num_sequences)
    end_bytes = first_sequence = 0
    for some_lengths, some_offsets in zip(lengths, offsets, strict=True):
        # int64: the length of a sequence in bytes may exceed int32.
        lengths_bytes = some_lengths.astype(np.int64) * dtype.itemsize
        expected_bytes = end_bytes + np.cumsum(lengths_bytes) - lengths_bytes
        wrong = np.flatnonzero((some_lengths < 0) | (some_offsets != expected_bytes))
        if len(wrong):
            k = int(wrong[0])
            what, length = f"{path}: sequence {first_sequence + k}", some_lengths[k]
            if length < 0:
                return None, [f"{what} must have a length of at least 0, got {length}. It is damaged; {REMEDY}"]
            return None, [
                f"{what} must start at byte {expected_bytes[k]}, where the lengths before it end, "
                f"got {some_offsets[k]}. It is damaged; {REMEDY}"
            ]
        first_sequence += len(some_lengths)
        end_bytes = int(expected_bytes[-1] + lengths_bytes[-1])
    return end_bytes // dtype.itemsize, []


def _scan_document_index(path: Path, num_sequences: int, document_index_length: int) -> list[str]:
    """The document index must rise from 0 to the number of sequences."""
    start_bytes = IDX_HEADER_BYTES + (LENGTH_BYTES + OFFSET_BYTES) * num_sequences
    last = first_entry = 0
    for entries in _read_in_chunks(path, np.dtype(np.int64), start_bytes, document_index_length):
        # The last entry of the chunk before: an entry may decrease at the border of two chunks.
        before = np.concatenate(([last], entries[:-1]))
        wrong = np.flatnonzero((entries < before) | (entries > num_sequences))
        if first_entry == 0 and entries[0] != 0:
            return [f"{path}: document index must start at 0, got {entries[0]}. It is damaged; {REMEDY}"]
        if len(wrong):
            k = int(wrong[0])
            return [
                f"{path}: document {first_entry + k - 1} must end at a sequence in {before[k]}..{num_sequences}, "
                f"got {entries[k]}. It is damaged; {REMEDY}"
            ]
        first_entry += len(entries)
        last = int(entries[-1])
    if last != num_sequences:
        return [f"{path}: document index must end at sequence {num_sequences}, got {last}. It is damaged; {REMEDY}"]
    return []


def _read_in_chunks(path: Path, dtype: np.dtype, start_bytes: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` entries from `start_bytes` on, in chunks."""
    with open(path, "rb") as file:
        file.seek(start_bytes)
        for start in range(0, count, SCAN_CHUNK_ENTRIES):
            yield read_array(file, dtype, min(SCAN_CHUNK_ENTRIES, count - start))


# --- .bin ------------------------------------------------------------------------------------------------------------


def _find_size_problems(path: Path, index: _Index | None, manifest: Manifest | None) -> list[str]:
    """The .bin must have the bytes that the .idx accounts for, or the manifest where the .idx is damaged itself."""
    if index is not None and index.num_tokens is not None:
        expected_tokens, dtype, named_by = index.num_tokens, index.dtype, "the .idx"
    elif manifest is not None:
        expected_tokens, dtype, named_by = manifest.num_tokens, np.dtype(manifest.dtype), "the manifest"
    else:
        return []
    expected_bytes, actual_bytes = expected_tokens * dtype.itemsize, path.stat().st_size
    if actual_bytes == expected_bytes:
        return []
    cause = "It is truncated" if actual_bytes < expected_bytes else "It has bytes too many"
    return [
        f"{path}: size must be {expected_bytes} bytes ({expected_tokens} tokens of {dtype.itemsize} bytes in "
        f"{named_by}), got {actual_bytes}. {cause}, or it is of another pair; {REMEDY}"
    ]


def _scan_ids(path: Path, dtype: np.dtype | None, on_progress: Callable[[int, int], None]) -> _Ids:
    """Read the whole .bin once; dtype None: only hash it. Bytes beyond the last whole id count for the hash alone."""
    smallest: list[int] = []
    largest: list[int] = []
    digest = hashlib.sha256()
    done_bytes, total_bytes = 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            if dtype is not None and np.issubdtype(dtype, np.integer) and len(chunk) >= dtype.itemsize:
                # Not the whole chunk: the last one of a truncated file may end inside an id.
                ids = np.frombuffer(chunk, dtype, count=len(chunk) // dtype.itemsize)
                smallest = [min([int(ids.min()), *smallest])]
                largest = [max([int(ids.max()), *largest])]
            on_progress(done_bytes, total_bytes)
    return _Ids(min(smallest, default=None), max(largest, default=None), digest.hexdigest())


def _find_id_problems(path: Path, ids: _Ids, vocab_size: int | None, manifest: Manifest | None) -> list[str]:
    if ids.smallest is None or ids.largest is None:
        return []
    named_by = "vocab_size"
    if vocab_size is None and manifest is not None:
        vocab_size, named_by = manifest.tokenizer.vocab_size, f"vocab_size of {manifest.tokenizer.name}"
    if ids.smallest < 0:
        return [f"{path}: token ids must be at least 0, got id={ids.smallest}. It is damaged; {REMEDY}"]
    if vocab_size is not None and ids.largest >= vocab_size:
        return [
            f"{path}: token ids must be below {named_by}, got id={ids.largest}, vocab_size={vocab_size}. "
            f"It is damaged or was made with another tokenizer; {REMEDY}"
        ]
    return []


# --- manifest --------------------------------------------------------------------------------------------------------


def _find_count_problems(prefix: Path, manifest: Manifest, index: _Index | None) -> list[str]:
    if index is None:
        return []
    found = {
        "dtype": index.dtype.name,
        "num_documents": index.num_documents,
        "num_sequences": index.num_sequences,
        "num_tokens": index.num_tokens,
    }
    # Fields that an older manifest does not have are None, and are not compared.
    expected = {name: getattr(manifest, name) for name in found}
    return [
        f"{idx_path(prefix)}: {name} must be {expected[name]}, as in {manifest_path(prefix).name}, got {value}. "
        f"It is damaged or of another pair; {REMEDY}"
        for name, value in found.items()
        if value is not None and expected[name] is not None and value != expected[name]
    ]


def _find_hash_problems(prefix: Path, manifest: Manifest, ids: _Ids | None, problems: list[str]) -> list[str]:
    """Compare hashes, but not those of a file that has been found damaged already."""
    own_bin_path, own_idx_path = bin_path(prefix), idx_path(prefix)
    wrong = {}
    if manifest.bin_sha256 is not None and ids is not None and not _is_named(own_bin_path, problems):
        wrong[own_bin_path] = (manifest.bin_sha256, ids.sha256)
    if manifest.idx_sha256 is not None and own_idx_path.is_file() and not _is_named(own_idx_path, problems):
        wrong[own_idx_path] = (manifest.idx_sha256, hash_file(own_idx_path))
    wrong = {path: hashes for path, hashes in wrong.items() if hashes[0] != hashes[1]}
    own_manifest_path = manifest_path(prefix)
    # Both files differ from the manifest: more likely one wrong manifest than two damaged files.
    if len(wrong) == 2:
        return [
            f"{own_manifest_path}: must describe the files beside it, got the SHA-256 of others for both. "
            f"It is of another pair, or both files are damaged; {REMEDY}"
        ]
    return [
        f"{path}: content must have the SHA-256 {expected[:12]}..., as in {own_manifest_path.name}, got "
        f"{actual[:12]}.... It is damaged or of another pair; {REMEDY}"
        for path, (expected, actual) in wrong.items()
    ]


def _is_named(path: Path, problems: list[str]) -> bool:
    # A second message about a file that is known to be damaged would not help.
    return any(problem.startswith(f"{path}: ") for problem in problems)
