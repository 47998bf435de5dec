"""Whether two .bin/.idx pairs hold the same data, wherever they lie: by counts, parts of their bytes, and manifests."""

import dataclasses
import functools
import hashlib
from pathlib import Path

from megatron_hammer.data.indexed.manifest import read_manifest
from megatron_hammer.data.indexed.pair import IndexSummary, bin_path, idx_path
from megatron_hammer.data.order.order import SourceIdentity
from megatron_hammer.errors import DataError

# A file up to their product is hashed whole; of a larger one so many blocks, spread over it, its ends included.
NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 18


def identify_source(prefix: str, index: IndexSummary) -> SourceIdentity:
    """The identity of a pair; reads at most 32 MiB of it. Its manifest's hashes count where there is a manifest."""
    try:
        manifest = read_manifest(prefix)
    except DataError:  # preflight reports it
        manifest = None
    return SourceIdentity(
        num_sequences=index.num_sequences,
        num_documents=index.num_documents,
        num_tokens=index.num_tokens,
        fingerprint="-".join(_hash_of(path) for path in (idx_path(prefix), bin_path(prefix))),
        bin_sha256=manifest.bin_sha256 if manifest else None,
        idx_sha256=manifest.idx_sha256 if manifest else None,
    )


def count_source(index: IndexSummary) -> SourceIdentity:
    """The identity as far as the headers tell it."""
    return SourceIdentity(
        num_sequences=index.num_sequences, num_documents=index.num_documents, num_tokens=index.num_tokens
    )


def is_same_data(first: SourceIdentity, second: SourceIdentity) -> bool | None:
    """None where one of them was not identified."""
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    # A field that one side does not know cannot show a difference.
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        return False
    return None if first.fingerprint is None or second.fingerprint is None else True


def _hash_of(path: Path) -> str:
    status = path.stat()
    return hash_blocks(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def hash_blocks(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Hash of a file's size and of blocks of it. mtime_ns: so that a rewritten file is read again."""
    # The size is part of the hash, because only some blocks of a large file are.
    digest = hashlib.sha256(str(size_bytes).encode())
    last_start = max(0, size_bytes - BLOCK_BYTES)
    starts = list(range(0, size_bytes, BLOCK_BYTES))
    if len(starts) > NUM_BLOCKS:
        # Spread over the whole file, so that a change in any larger part of it is likely to be seen.
        starts = [last_start * block // (NUM_BLOCKS - 1) for block in range(NUM_BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]
