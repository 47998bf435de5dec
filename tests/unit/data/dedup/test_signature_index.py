"""Similar documents are found as by the index of datasketch, and as often as the closed form says."""

import dataclasses
import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from megatron_hammer.data.dedup import signature_index
from megatron_hammer.data.dedup.near_duplicates import NearDuplicateOptions, Signer, removal_probability, select_bands
from megatron_hammer.data.dedup.signature_index import Match, SignatureIndex

WORDS = NearDuplicateOptions(ngram=1)


def keep_with_datasketch(signatures: np.ndarray, options: NearDuplicateOptions) -> list[Match | None]:
    """The same decisions, taken one by one from MinHashLSH; keys are rows."""
    bands = select_bands(options)
    index = MinHashLSH(num_perm=options.num_permutations, params=(bands.num_bands, bands.num_rows))
    kept: dict[int, MinHash] = {}
    matches: list[Match | None] = []
    for row, values in enumerate(signatures):
        sketch = MinHash(hashvalues=values, seed=options.seed, scheme="affine32")
        similarities = {key: sketch.jaccard(kept[key]) for key in sorted(index.query(sketch))}
        best = max(similarities, key=lambda key: (similarities[key], -key), default=None)
        is_removed = best is not None and similarities[best] >= options.threshold
        matches.append(Match(best, similarities[best]) if is_removed and best is not None else None)
        if not is_removed:
            index.insert(row, sketch)
            kept[row] = sketch
    return matches


def draw_families(options: NearDuplicateOptions, num_families: int, num_members: int) -> np.ndarray:
    """Random signatures, each followed anywhere by others that agree with it in 60 to 100 % of the values."""
    rng = np.random.default_rng(4)
    shape = (num_families, num_members, options.num_permutations)
    parents = rng.integers(0, 2**32, (num_families, 1, options.num_permutations), dtype=np.uint32)
    others = rng.integers(0, 2**32, shape, dtype=np.uint32)
    agrees = rng.random(shape) < rng.uniform(0.6, 1.0, (num_families, num_members, 1))
    signatures = np.where(agrees, parents, others).reshape(-1, options.num_permutations)
    rng.shuffle(signatures)
    return signatures


@pytest.mark.parametrize("batch", [1, 7, 400])
@pytest.mark.parametrize("options", [NearDuplicateOptions(), NearDuplicateOptions(threshold=0.7, num_permutations=65)])
def test_the_decisions_are_those_of_datasketch(
    options: NearDuplicateOptions, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature_index, "SIGNATURES_A_BLOCK", 16)
    signatures = draw_families(options, num_families=40, num_members=10)
    expected = keep_with_datasketch(signatures, options)
    assert 50 < sum(match is None for match in expected) < 350
    index = SignatureIndex(options)
    matches: list[Match | None] = []
    for start in range(0, len(signatures), batch):
        here = signatures[start : start + batch]
        matches += index.keep_unlike(here, range(start, start + len(here)))
    assert matches == expected
    stricter = SignatureIndex(dataclasses.replace(options, threshold=options.threshold + 0.05))  # the twin
    assert stricter.keep_unlike(signatures, range(len(signatures))) != expected


def test_values_that_agree_in_different_bands_do_not_count() -> None:
    options = NearDuplicateOptions(threshold=0.1)
    rows = select_bands(options).num_rows
    first = np.arange(128, dtype=np.uint32)
    second = np.roll(first, rows)
    assert SignatureIndex(options).keep_unlike(np.stack((first, second)), [1, 2]) == [None, None]
    assert SignatureIndex(options).keep_unlike(np.stack((first, first)), [1, 2]) == [None, Match(1, 1.0)]


def draw_similar_pair(rng: random.Random, num_common: int, num_own: int) -> tuple[str, str]:
    """Two texts of distinct words with similarity num_common / (num_common + 2 * num_own)."""
    words = [f"w{rng.getrandbits(60):x}" for _ in range(num_common + 2 * num_own)]
    return " ".join(words[: num_common + num_own]), " ".join(words[:num_common] + words[num_common + num_own :])


def count_removed(options: NearDuplicateOptions, num_common: int, num_own: int, num_pairs: int) -> int:
    rng = random.Random(5)
    index, signer = SignatureIndex(options), Signer(options)
    num_removed = 0
    for pair in range(num_pairs):
        first, second = (signer.sign(text) for text in draw_similar_pair(rng, num_common, num_own))
        assert first is not None
        assert second is not None
        first_match, second_match = index.keep_unlike(np.stack((first, second)), [pair, -1])
        assert first_match is None, "a pair must be unlike all others"
        assert second_match is None or second_match.key == pair
        num_removed += second_match is not None
    return num_removed


@pytest.mark.parametrize("num_common, num_own", [(70, 15), (78, 11), (80, 10), (84, 8), (90, 5)])
def test_similar_pairs_are_removed_as_often_as_the_closed_form_says(num_common: int, num_own: int) -> None:
    num_pairs = 250
    num_removed = count_removed(WORDS, num_common, num_own, num_pairs)
    chance = removal_probability(num_common / (num_common + 2 * num_own), WORDS)
    # The n-grams of one corpus share their permutations, so pairs are nearly, not exactly, independent.
    tolerance = 4.5 * (num_pairs * max(chance * (1 - chance), 1 / num_pairs)) ** 0.5
    assert abs(num_removed - num_pairs * chance) <= tolerance
    if 0.7 < num_common / 100 < 0.9:  # the twin: the curve of another threshold does not fit
        wrong = removal_probability(num_common / 100, dataclasses.replace(WORDS, threshold=0.9))
        assert abs(num_removed - num_pairs * wrong) > tolerance
