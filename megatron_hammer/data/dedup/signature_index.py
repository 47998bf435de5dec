"""The signatures of the documents kept so far, and which of them a new document resembles.

As in datasketch's MinHashLSH, signatures are cut into bands, and two documents that agree in all values of a band are
compared; tests/unit/data/dedup/test_signature_index.py holds the candidates equal. Bands are kept as 64-bit hashes in
sorted arrays instead of sets of bytes: 0.7 KB per document at 128 permutations, with its signature, instead of 6 KB.
"""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions, select_bands
from megatron_hammer.data.dedup.sorted_runs import SortedRuns

# Blocks of fixed size: one growing array would be copied, and held twice, each time it is full.
SIGNATURES_A_BLOCK = 1 << 14
# A multiplier of MurmurHash3's 64-bit finalizer.
HASH_MULTIPLIER = np.uint64(0xFF51AFD7ED558CCD)
HASH_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Match:
    """The kept document that a new one resembles most, by its key, and the estimated similarity."""

    key: int
    similarity: float


class SignatureIndex:
    """Grows by every document that resembles none before it."""

    def __init__(self, options: NearDuplicateOptions):
        options.validate()
        self._options = options
        self._bands = select_bands(options)
        self._band_hashes = SortedRuns()
        self._blocks: list[np.ndarray] = []
        self._keys = array("q")

    def keep_unlike(self, signatures: np.ndarray, keys: Sequence[int]) -> list[Match | None]:
        """Return what each document resembles most, or None; those that resemble none are kept.

        signatures: uint32 [n, num_permutations]; keys: n, in the order in which the documents are considered.
        Among equally similar documents the first that was kept counts.
        """
        hashes = self._hash_bands(signatures)
        indexed = self._find_indexed(hashes)
        # Documents of one batch are not in the index yet, so those that share a band are compared with each other here.
        shared = _find_shared(hashes)
        kept_by_hash: dict[int, list[int]] = defaultdict(list)
        matches: list[Match | None] = [None] * len(keys)
        # In the order of the input: an earlier document is kept and a later one that resembles it is removed.
        for row in sorted(indexed.keys() | shared.keys()):
            numbers = sorted(indexed.get(row, ()))
            rows = sorted({other for band in shared.get(row, ()) for other in kept_by_hash[band]})
            candidates = [self._blocks[n // SIGNATURES_A_BLOCK][n % SIGNATURES_A_BLOCK] for n in numbers]
            candidates += [signatures[other] for other in rows]
            candidate_keys = [self._keys[n] for n in numbers] + [keys[other] for other in rows]
            matches[row] = self._choose(signatures[row], candidates, candidate_keys)
            if matches[row] is None:
                for band in shared.get(row, ()):
                    kept_by_hash[band].append(row)
        kept = np.array([row for row, match in enumerate(matches) if match is None], dtype=np.int64)
        self._add(signatures[kept], hashes[kept], [keys[row] for row in kept])
        return matches

    def _hash_bands(self, signatures: np.ndarray) -> np.ndarray:
        """Return 64 bits for the values of each band: uint64 [n, num_bands]; they differ from band to band."""
        num_bands, num_rows = self._bands.num_bands, self._bands.num_rows
        values = signatures[:, : num_bands * num_rows].reshape(-1, num_bands, num_rows).astype(np.uint64)
        # Starts with the number of the band: equal values in different bands must not meet.
        hashes = np.broadcast_to(np.arange(1, num_bands + 1, dtype=np.uint64), values.shape[:2])
        for row in range(num_rows):
            hashes = (hashes ^ values[:, :, row]) * HASH_MULTIPLIER  # wraps modulo 2^64, as meant
            hashes = hashes ^ (hashes >> HASH_SHIFT)
        return hashes

    def _find_indexed(self, hashes: np.ndarray) -> dict[int, set[int]]:
        """Return the numbers of the kept documents that share a band with each row, where there are any."""
        found: dict[int, set[int]] = defaultdict(set)
        for places, numbers in self._band_hashes.find(hashes.ravel()):
            for row, number in zip((places // hashes.shape[1]).tolist(), numbers.tolist(), strict=True):
                found[row].add(number)
        return found

    def _choose(self, signature: np.ndarray, candidates: list[np.ndarray], keys: list[int]) -> Match | None:
        if not candidates:
            return None
        num_equal = (np.stack(candidates) == signature).sum(axis=1)
        best = int(num_equal.argmax())
        if num_equal[best] < self._options.min_matches:
            return None
        return Match(keys[best], float(num_equal[best]) / self._options.num_permutations)

    def _add(self, signatures: np.ndarray, hashes: np.ndarray, keys: list[int]) -> None:
        numbers = np.arange(len(self._keys), len(self._keys) + len(keys), dtype=np.uint32)
        self._band_hashes.add(hashes.ravel(), np.repeat(numbers, hashes.shape[1]))
        for signature in signatures:
            if len(self._keys) == SIGNATURES_A_BLOCK * len(self._blocks):
                self._blocks.append(np.empty((SIGNATURES_A_BLOCK, signatures.shape[1]), dtype=np.uint32))
            self._blocks[-1][len(self._keys) % SIGNATURES_A_BLOCK] = signature
            self._keys.append(keys[len(self._keys) - int(numbers[0])])


def _find_shared(hashes: np.ndarray) -> dict[int, list[int]]:
    """Return, for each row that shares a band with another row, the hashes of such bands."""
    flat = hashes.ravel()
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    shared: dict[int, list[int]] = defaultdict(list)
    for place in np.flatnonzero(counts[inverse] > 1).tolist():
        shared[place // hashes.shape[1]].append(int(flat[place]))
    return shared
