"""A large table of keys and values in numpy, for which Python objects would take ten times the memory."""

from collections.abc import Iterator

import numpy as np


class SortedRuns:
    """Pairs of key and value as a few sorted arrays, the largest first, merged as they grow.

    Keys of any numpy type that sorts; one key may have many values. Memory: the items' own, up to three times that
    while runs are merged. Adding n pairs in batches costs n log(n), a look-up log(n) in each of log(n / batch) runs.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add pairs in any order: keys [n], values [n]."""
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        # A run is at least twice as large as the next, so there are few of them and each pair is merged rarely.
        while self._runs and len(self._runs[-1][0]) < 2 * len(keys):
            run_keys, run_values = self._runs.pop()
            keys, values = np.concatenate((run_keys, keys)), np.concatenate((run_values, values))
            order = np.argsort(keys, kind="stable")
            keys, values = keys[order], values[order]
        if len(keys):
            self._runs.append((keys, values))

    def find(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in `keys`: [n] and one value for each: [n], until all values of all keys have been seen."""
        for run_keys, run_values in self._runs:
            # Every run is searched: a key may have values in several of them.
            places = np.arange(len(keys))
            positions = np.searchsorted(run_keys, keys)
            while len(places):
                is_found = positions < len(run_keys)
                is_found[is_found] = run_keys[positions[is_found]] == keys[places[is_found]]
                places, positions = places[is_found], positions[is_found]
                if len(places):
                    yield places, run_values[positions]
                # A key may occur several times in a run; its occurrences lie next to each other.
                positions = positions + 1
