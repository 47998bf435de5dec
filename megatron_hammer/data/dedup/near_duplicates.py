"""Documents that share most of their n-grams: MinHash signatures, and how likely they are to be found.

A text is read as units, so that one definition serves Chinese, English and code: a run of letters, digits and
underscores is a unit (a word, a number, an identifier), each character of a script that is written without spaces is
one (Chinese, Japanese kana, Thai, Lao, Khmer, Burmese), and so is every other visible character (punctuation,
operators). Case and white space do not count. A document is the set of its n-grams of units; the similarity of two is
the share of n-grams that they have in common, |A & B| / |A | B| (Jaccard).
Signatures and the choice of bands are datasketch's; signature_index.py finds documents again by them.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_hammer.errors import ConfigError

# CJK radicals and ideographs, kana, bopomofo; Thai, Lao, Burmese, Khmer; the supplementary ideographic planes.
UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff"
)
UNIT_PATTERN = re.compile(rf"[^\W{UNSPACED}]+|[^\s]")
UNIT_START_PATTERN = re.compile(rf"[\W{UNSPACED}]")  # a text may be split before such a character
SLICE_CHARACTERS = 1 << 20  # a unit takes sixty bytes as a Python string, and some documents have 50 MB
# 2^64 divided by the golden ratio, made odd: the multiplier of Fibonacci hashing, which spreads near numbers far.
NGRAM_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MAX_CACHED_UNITS = 1 << 20
# Larger blocks do not fit into the processor's cache; a whole document would need 512 bytes per n-gram.
SIGNATURE_BLOCK_NGRAMS = 2048
# A candidate that is not similar enough is refused by its signature, so bands may err on the side of finding more.
FALSE_POSITIVE_WEIGHT, FALSE_NEGATIVE_WEIGHT = 0.1, 0.9
MIN_PERMUTATIONS, MAX_PERMUTATIONS = 16, 1024
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicateOptions:
    """threshold: least similarity of a near duplicate. ngram: units an n-gram. seed: draws the permutations."""

    threshold: float = 0.8
    num_permutations: int = 128
    ngram: int = 5
    seed: int = 1234

    @property
    def min_matches(self) -> int:
        """Least number of equal values of two signatures that makes a near duplicate."""
        # A product such as 0.55 x 100 may lie just above a whole number in floating point.
        return math.ceil(self.threshold * self.num_permutations - 1e-9)

    def validate(self) -> None:
        """Raises ConfigError naming every value that cannot work."""
        problems = []
        if not 0 < self.threshold <= 1:
            problems.append(f"threshold: must lie above 0 and up to 1, got {self.threshold}. Pass --threshold 0.8.")
        if not MIN_PERMUTATIONS <= self.num_permutations <= MAX_PERMUTATIONS:
            problems.append(
                f"num-permutations: must lie in {MIN_PERMUTATIONS}..{MAX_PERMUTATIONS}, "
                f"got {self.num_permutations}. Pass --num-permutations 128."
            )
        if self.ngram < 1:
            problems.append(f"ngram: must be at least 1, got {self.ngram}. Pass --ngram 5.")
        if not 0 <= self.seed <= MAX_SEED:
            problems.append(f"seed: must lie in 0..{MAX_SEED}, got {self.seed}. Pass another --seed.")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True)
class Bands:
    """Signatures are compared where all `num_rows` values of one of `num_bands` bands agree."""

    num_bands: int
    num_rows: int


class NgramHasher:
    """Computes the hashes of a text's n-grams; the same on every machine and in every run."""

    def __init__(self, ngram: int):
        self._ngram = ngram
        self._unit_hashes = _UnitHashes()

    def hash(self, text: str) -> Iterator[np.ndarray]:
        """Yield the hashes of a text's n-grams, in order and in parts: uint32, units - ngram + 1 in all.

        A text of fewer units is one n-gram; one without units has none.
        """
        is_shorter = True
        units = np.empty(0, dtype=np.uint64)
        for more_units in self._hash_units(text):
            units = np.concatenate((units, more_units))
            if len(units) >= self._ngram:
                yield _combine(units, self._ngram)
                units = units[len(units) - self._ngram + 1 :]
                is_shorter = False
        if is_shorter and len(units):
            yield _combine(units, len(units))

    def _hash_units(self, text: str) -> Iterator[np.ndarray]:
        """Yield 64 bits for every unit, in order and in parts: uint64."""
        start = 0
        while start < len(text):
            # A slice must end where a unit ends, so that the units do not depend on how the text is cut.
            unit_start = UNIT_START_PATTERN.search(text, start + SLICE_CHARACTERS)
            end = unit_start.start() if unit_start is not None else len(text)
            # casefold and not lower: it also makes the German sharp s and "ss" the same.
            units = UNIT_PATTERN.findall(text[start:end].casefold())
            yield np.fromiter(map(self._unit_hashes.__getitem__, units), np.uint64, len(units))
            start = end
        if len(self._unit_hashes) > MAX_CACHED_UNITS:
            self._unit_hashes.clear()


def _combine(units: np.ndarray, ngram: int) -> np.ndarray:
    """Return a hash for every run of `ngram` units: uint32 [len(units) - ngram + 1]."""
    combined = np.zeros(len(units) - ngram + 1, dtype=np.uint64)
    for position in range(ngram):  # wraps modulo 2^64, as meant
        combined = combined * NGRAM_MULTIPLIER + units[position : position + len(combined)]
    # The upper half: in a product modulo 2^64 the low bits depend on the low bits of the factors only.
    return (combined >> np.uint64(32)).astype(np.uint32)


class _UnitHashes(dict[str, int]):
    """64 bits for each unit, kept because most units are met again; Python's own hash differs from run to run."""

    def __missing__(self, unit: str) -> int:
        value = int.from_bytes(hashlib.blake2b(unit.encode("utf-8"), digest_size=8).digest(), "little")
        self[unit] = value
        return value


class Signer:
    """Computes MinHash signatures: the share of equal values estimates the similarity of two texts."""

    def __init__(self, options: NearDuplicateOptions):
        from datasketch import MinHash  # loads scipy, which takes a second

        self._hasher = NgramHasher(options.ngram)
        self._sketch = MinHash(num_perm=options.num_permutations, seed=options.seed, hashfunc=_identity)

    def sign(self, text: str) -> np.ndarray | None:
        """Return the signature of a text: uint32 [num_permutations]; None if it has no units."""
        # One sketch is used again: drawing its permutations costs more than signing a short text.
        self._sketch.clear()
        has_ngrams = False
        for hashes in self._hasher.hash(text):
            has_ngrams = True
            for start in range(0, len(hashes), SIGNATURE_BLOCK_NGRAMS):
                # One "value" that is an array of hashes: datasketch flattens it, which saves one call per n-gram.
                self._sketch.update_batch((hashes[start : start + SIGNATURE_BLOCK_NGRAMS],))
        return self._sketch.hashvalues if has_ngrams else None


def select_bands(options: NearDuplicateOptions) -> Bands:
    """Return the bands that suit the threshold, by datasketch's rule.

    The chance to be compared at similarity s is 1 - (1 - s^num_rows)^num_bands.
    """
    from datasketch import MinHashLSH

    weights = (FALSE_POSITIVE_WEIGHT, FALSE_NEGATIVE_WEIGHT)
    try:
        bands = MinHashLSH(threshold=options.threshold, num_perm=options.num_permutations, weights=weights)
    except ValueError:  # near a threshold of 1 one band would be best, which datasketch refuses
        return Bands(2, options.num_permutations // 2)
    return Bands(bands.b, bands.r)


def removal_probability(similarity: float, options: NearDuplicateOptions) -> float:
    """The chance that a document of this similarity to a kept one is removed; exact for random permutations.

    Each of the k permutations agrees with chance s. A document is removed if all r of some band agree, and at least
    threshold * k agree in all: P(all >= m) - P(no band is full, all >= m), by convolving the bands' distributions.
    Source of the bands: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.
    """
    bands = select_bands(options)
    num_spare = options.num_permutations - bands.num_bands * bands.num_rows
    band = _binomial(bands.num_rows, similarity)
    not_full = band.copy()
    not_full[-1] = 0.0
    any_bands = unfilled_bands = _binomial(num_spare, similarity)
    for _ in range(bands.num_bands):
        any_bands, unfilled_bands = np.convolve(any_bands, band), np.convolve(unfilled_bands, not_full)
    least = options.min_matches
    return float(any_bands[least:].sum() - unfilled_bands[least:].sum())


def _binomial(count: int, chance: float) -> np.ndarray:
    """Probabilities of 0..count successes."""
    return np.array([math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)])


def _identity(value: np.ndarray) -> np.ndarray:
    return value
