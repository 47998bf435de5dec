"""Near duplicates: units, signatures equal to those of datasketch, and the probability of removal."""

import numpy as np
import pytest
from datasketch import MinHash

from megatron_hammer.data.dedup import near_duplicates
from megatron_hammer.data.dedup.near_duplicates import (
    SIGNATURE_BLOCK_NGRAMS,
    UNIT_PATTERN,
    NearDuplicateOptions,
    NgramHasher,
    Signer,
    removal_probability,
    select_bands,
)
from megatron_hammer.errors import ConfigError


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


def hash_text(ngram: int, text: str) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.uint32), *NgramHasher(ngram).hash(text)])


def test_ngrams_ignore_case_and_white_space() -> None:
    hashes = hash_text(3, "One two\nTHREE four")
    assert hashes.dtype == np.uint32
    assert len(hashes) == 2
    assert np.array_equal(hashes, hash_text(3, "one  two three   Four"))
    assert np.array_equal(hashes, hash_text(3, "one two three four"))
    assert not set(hashes) & set(hash_text(3, "two one three four"))


def test_a_short_text_is_one_ngram() -> None:
    assert len(hash_text(5, "one two")) == 1
    assert len(hash_text(5, "")) == 0
    assert Signer(NearDuplicateOptions()).sign(" \n") is None


@pytest.mark.parametrize("slice_characters", [1, 5, 64])
def test_a_long_text_is_hashed_in_slices(monkeypatch: pytest.MonkeyPatch, slice_characters: int) -> None:
    text = "".join(("one_two  Straße 春眠不觉晓，", "x" * 150, "处处闻啼鸟 f(y)+=1;\n", "ไทย ", "end"))
    whole = hash_text(3, text)
    monkeypatch.setattr(near_duplicates, "SLICE_CHARACTERS", slice_characters)
    assert np.array_equal(hash_text(3, text), whole)


def test_hashes_do_not_depend_on_the_process() -> None:
    assert hash_text(2, "a b 春").tolist() == [4097984014, 4175562964]


def test_a_signature_is_that_of_datasketch() -> None:
    text = " ".join(f"word{i}" for i in range(2 * SIGNATURE_BLOCK_NGRAMS + 7))
    options = NearDuplicateOptions(num_permutations=48, seed=7)
    oracle = MinHash(num_perm=48, seed=7, hashfunc=int)
    for value in hash_text(options.ngram, text).tolist():
        oracle.update(value)
    assert np.array_equal(Signer(options).sign(text), oracle.hashvalues)
    other_seed = Signer(NearDuplicateOptions(num_permutations=48, seed=8))  # the twin
    assert not np.array_equal(other_seed.sign(text), oracle.hashvalues)


@pytest.mark.parametrize("threshold, num_permutations", [(0.8, 128), (0.5, 96)])
def test_the_closed_form_agrees_with_drawn_permutations(threshold: float, num_permutations: int) -> None:
    options = NearDuplicateOptions(threshold=threshold, num_permutations=num_permutations)
    bands = select_bands(options)
    rng = np.random.default_rng(3)
    for similarity in (threshold - 0.08, threshold, threshold + 0.05):
        agrees = rng.random((20_000, num_permutations)) < similarity
        in_bands = agrees[:, : bands.num_bands * bands.num_rows].reshape(-1, bands.num_bands, bands.num_rows)
        has_full_band = in_bands.all(axis=2).any(axis=1)
        drawn = (has_full_band & (agrees.mean(axis=1) >= threshold)).mean()
        expected = removal_probability(similarity, options)
        assert drawn == pytest.approx(expected, abs=4.5 * (0.25 / 20_000) ** 0.5)
    assert removal_probability(1.0, options) == pytest.approx(1.0)
    assert removal_probability(0.0, options) == pytest.approx(0.0)


def test_the_closed_form_holds_for_the_longest_signatures() -> None:
    options = NearDuplicateOptions(threshold=1.0, num_permutations=1024)
    assert select_bands(options).num_bands == 2
    assert removal_probability(1.0, options) == pytest.approx(1.0)
    assert removal_probability(0.99, options) == pytest.approx(0.99**1024)


def test_bands_find_nearly_all_that_signatures_accept() -> None:
    """At similarity s a pair shares a band with chance 1 - (1 - s^r)^b, which must not be what limits recall."""
    bands = select_bands(NearDuplicateOptions())
    assert (bands.num_bands, bands.num_rows) == (14, 9)
    assert 1 - (1 - 0.85**bands.num_rows) ** bands.num_bands > 0.97


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.0}, r"^threshold: must lie above 0 and up to 1, got 0\.0\. Pass --threshold 0\.8\.$"),
        ({"threshold": 1.5}, "^threshold: must lie above 0"),
        ({"threshold": float("nan")}, "^threshold: must lie above 0"),
        ({"num_permutations": 8}, r"^num-permutations: must lie in 16\.\.1024, got 8\."),
        ({"ngram": 0}, r"^ngram: must be at least 1, got 0\. Pass --ngram 5\.$"),
        ({"seed": -1}, r"^seed: must lie in 0\.\.4294967295, got -1\."),
    ],
)
def test_options_that_cannot_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NearDuplicateOptions(**options).validate()  # type: ignore[arg-type]
