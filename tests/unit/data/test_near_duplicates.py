"""Near duplicates: what a unit is, that signatures are datasketch's, and that removal follows its closed form."""

import dataclasses
import random

import numpy as np
import pytest
from datasketch import MinHash

from megatron_hammer.data.near_duplicates import (
    SIGNATURE_BLOCK_NGRAMS,
    UNIT_PATTERN,
    NearDuplicateIndex,
    NearDuplicateOptions,
    NgramHasher,
    build_bands,
    removal_probability,
)
from megatron_hammer.errors import ConfigError

WORDS = NearDuplicateOptions(ngram=1)


@pytest.mark.parametrize(
    "text, units",
    [
        ("the cat's 2nd hat", ["the", "cat", "'", "s", "2nd", "hat"]),
        ("春眠不觉晓，abc中", ["春", "眠", "不", "觉", "晓", "，", "abc", "中"]),
        ("x_1 += f(y);", ["x_1", "+", "=", "f", "(", "y", ")", ";"]),
        ("ひらがな 한국어 ไทย", ["ひ", "ら", "が", "な", "한국어", "ไ", "ท", "ย"]),
        (" \n\t", []),
    ],
)
def test_units(text: str, units: list[str]) -> None:
    assert UNIT_PATTERN.findall(text) == units


def test_ngrams_ignore_case_and_white_space() -> None:
    hasher = NgramHasher(3)
    hashes = hasher.hash("One two\nTHREE four")
    assert hashes.dtype == np.uint32
    assert len(hashes) == 2
    assert np.array_equal(hashes, hasher.hash("one  two three   Four"))
    assert np.array_equal(hashes, NgramHasher(3).hash("one two three four"))
    assert not set(hashes) & set(hasher.hash("two one three four"))


def test_a_short_text_is_one_ngram() -> None:
    hasher = NgramHasher(5)
    assert len(hasher.hash("one two")) == 1
    assert len(hasher.hash("")) == 0
    assert NearDuplicateIndex(NearDuplicateOptions()).sign(" \n") is None


def test_hashes_do_not_depend_on_the_process() -> None:
    assert NgramHasher(2).hash("a b 春").tolist() == [4097984014, 4175562964]


def test_a_signature_is_that_of_datasketch() -> None:
    text = " ".join(f"word{i}" for i in range(2 * SIGNATURE_BLOCK_NGRAMS + 7))
    options = NearDuplicateOptions(num_permutations=48, seed=7)
    oracle = MinHash(num_perm=48, seed=7, hashfunc=int)
    for value in NgramHasher(options.ngram).hash(text).tolist():
        oracle.update(value)
    assert np.array_equal(NearDuplicateIndex(options).sign(text), oracle.hashvalues)
    other_seed = NearDuplicateIndex(dataclasses.replace(options, seed=8))
    assert not np.array_equal(other_seed.sign(text), oracle.hashvalues)


def test_the_best_match_is_found_and_named() -> None:
    index = NearDuplicateIndex(WORDS)
    texts = {10: "a b c d e f g h i j", 20: "k l m n o p q r s t", 30: "a b c d e f g h i x"}
    for key, text in texts.items():
        signature = index.sign(text)
        assert signature is not None
        index.add(key, signature)
    for key, text in texts.items():
        signature = index.sign(text)
        assert signature is not None
        match = index.find(signature)
        assert match is not None
        assert (match.key, match.similarity) == (key, 1.0)
    unlike = index.sign("1 2 3 4 5 6 7 8 9")
    assert unlike is not None
    assert index.find(unlike) is None


def plant_pair(rng: random.Random, num_common: int, num_own: int) -> tuple[str, str]:
    """Two texts of distinct words with similarity num_common / (num_common + 2 * num_own)."""
    words = [f"w{rng.getrandbits(60):x}" for _ in range(num_common + 2 * num_own)]
    return " ".join(words[: num_common + num_own]), " ".join(words[:num_common] + words[num_common + num_own :])


def count_removed(options: NearDuplicateOptions, num_common: int, num_own: int, num_pairs: int) -> int:
    rng = random.Random(5)
    index = NearDuplicateIndex(options)
    num_removed = 0
    for pair in range(num_pairs):
        first, second = (index.sign(text) for text in plant_pair(rng, num_common, num_own))
        assert first is not None
        assert second is not None
        assert index.find(first) is None, "a pair must be unlike all others"
        index.add(pair, first)
        match = index.find(second)
        assert match is None or match.key == pair
        num_removed += match is not None
    return num_removed


@pytest.mark.parametrize("num_common, num_own", [(70, 15), (78, 11), (80, 10), (84, 8), (90, 5)])
def test_planted_pairs_are_removed_as_often_as_the_closed_form_says(num_common: int, num_own: int) -> None:
    num_pairs = 250
    num_removed = count_removed(WORDS, num_common, num_own, num_pairs)
    chance = removal_probability(num_common / (num_common + 2 * num_own), WORDS)
    # The n-grams of one corpus share their permutations, so pairs are nearly, not exactly, independent.
    tolerance = 4.5 * (num_pairs * max(chance * (1 - chance), 1 / num_pairs)) ** 0.5
    assert abs(num_removed - num_pairs * chance) <= tolerance
    if 0.7 < num_common / 100 < 0.9:  # the twin: the curve of another threshold does not fit
        wrong = removal_probability(num_common / 100, dataclasses.replace(WORDS, threshold=0.9))
        assert abs(num_removed - num_pairs * wrong) > tolerance


@pytest.mark.parametrize("threshold, num_permutations", [(0.8, 128), (0.5, 96)])
def test_the_closed_form_agrees_with_drawn_permutations(threshold: float, num_permutations: int) -> None:
    options = NearDuplicateOptions(threshold=threshold, num_permutations=num_permutations)
    bands = build_bands(options)
    rng = np.random.default_rng(3)
    for similarity in (threshold - 0.08, threshold, threshold + 0.05):
        agrees = rng.random((20_000, num_permutations)) < similarity
        has_full_band = agrees[:, : bands.b * bands.r].reshape(-1, bands.b, bands.r).all(axis=2).any(axis=1)
        drawn = (has_full_band & (agrees.mean(axis=1) >= threshold)).mean()
        expected = removal_probability(similarity, options)
        assert drawn == pytest.approx(expected, abs=4.5 * (0.25 / 20_000) ** 0.5)
    assert removal_probability(1.0, options) == pytest.approx(1.0)
    assert removal_probability(0.0, options) == pytest.approx(0.0)


def test_bands_find_nearly_all_that_signatures_accept() -> None:
    """At similarity s a pair shares a band with chance 1 - (1 - s^r)^b, which must not be what limits recall."""
    bands = build_bands(NearDuplicateOptions())
    assert (bands.b, bands.r) == (14, 9)
    assert 1 - (1 - 0.85**bands.r) ** bands.b > 0.97


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.0}, r"^threshold: must lie above 0 and up to 1, got 0\.0\. Pass --threshold 0\.8\.$"),
        ({"threshold": 1.5}, "^threshold: must lie above 0"),
        ({"threshold": float("nan")}, "^threshold: must lie above 0"),
        ({"num_permutations": 8}, r"^num-permutations: must lie in 16\.\.4096, got 8\."),
        ({"ngram": 0}, r"^ngram: must be at least 1, got 0\. Pass --ngram 5\.$"),
        ({"seed": -1}, r"^seed: must lie in 0\.\.4294967295, got -1\."),
        ({"threshold": 1.0, "num_permutations": 16}, "^num-permutations: must allow two bands at this threshold"),
    ],
)
def test_options_that_cannot_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NearDuplicateIndex(NearDuplicateOptions(**options))  # type: ignore[arg-type]
