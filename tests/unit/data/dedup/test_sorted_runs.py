"""A lookup table of sorted arrays against a dictionary of lists."""

import random
from collections import defaultdict

import numpy as np
import pytest

from megatron_hammer.data.dedup.sorted_runs import SortedRuns


@pytest.mark.parametrize("dtype", ["uint64", "S16"])
def test_lookups_agree_with_a_dictionary(dtype: str) -> None:
    rng = random.Random(3)
    runs, expected = SortedRuns(), defaultdict(list)
    num_added = 0
    for size in (1, 0, 500, 3, 40, 1200, 7, 7, 300):
        # Few distinct keys; as bytes some end in zeros, which numpy strips from a scalar.
        numbers = [rng.randrange(400) * 256 for _ in range(size)]
        keys = build_keys(numbers, dtype)
        values = np.arange(num_added, num_added + size)
        for number, value in zip(numbers, values.tolist(), strict=True):
            expected[number].append(value)
        runs.add(keys, values)
        num_added += size
        assert sum(len(keys) for keys, _ in runs._runs) == num_added
        sought = [rng.randrange(500) * 256 for _ in range(50)]
        found = defaultdict(list)
        for places, values_here in runs.find(build_keys(sought, dtype)):
            for place, value in zip(places.tolist(), values_here.tolist(), strict=True):
                found[place].append(value)
        assert {place: sorted(values) for place, values in found.items()} == {
            place: expected[number] for place, number in enumerate(sought) if number in expected
        }
    assert len(runs._runs) < 6


def build_keys(numbers: list[int], dtype: str) -> np.ndarray:
    if dtype == "uint64":
        return np.array(numbers, dtype=np.uint64)
    return np.array([number.to_bytes(16, "big") for number in numbers], dtype=dtype)


def test_an_empty_table_finds_nothing() -> None:
    assert list(SortedRuns().find(np.array([1, 2], dtype=np.uint64))) == []
