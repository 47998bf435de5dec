"""Which conversations share a row of seq_length positions, and in which order the rows are drawn. numpy alone.

A conversation of n tokens takes n - 1 positions: each is an input whose label is the token after it. Rows are filled by
best fit, the longest conversation first, which depends on the lengths alone. So every epoch has as many rows, and an
epoch differs from another only by its shuffles: which conversation of a length takes which place, and the order of the
rows. Sample i is row i % num_rows of epoch i // num_rows, whatever the length of the run, so a longer run is the same
order, continued.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

MIN_CONVERSATION_TOKENS = 2  # one to read and one to learn


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """How conversations become rows.

    granularity: a conversation's positions are rounded up to a multiple of it (2 * cp under context parallelism, where
    every rank takes two equal parts of each conversation). is_packed: False for one conversation per row.
    """

    seq_length: int
    is_packed: bool
    is_truncated: bool
    granularity: int = 1

    @property
    def description(self) -> str:
        """packed conversations, cut to fit, in multiples of 4 positions"""
        words = ["packed conversations" if self.is_packed else "one conversation per sequence"]
        words += ["cut to fit"] * self.is_truncated
        words += [f"in multiples of {self.granularity} positions"] * (self.granularity > 1)
        return ", ".join(words)

    def count_positions(self, lengths: np.ndarray) -> np.ndarray:
        """Positions that conversations of these lengths in tokens take in a row, padding included."""
        positions = np.minimum(np.asarray(lengths, dtype=np.int64) - 1, self.seq_length)
        return -(-positions // self.granularity) * self.granularity

    def is_too_long(self, lengths: np.ndarray) -> np.ndarray:
        """Whether each conversation must be cut to fit into a row."""
        return np.asarray(lengths) - 1 > self.seq_length


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one source. positions [n]: of each conversation.

    row_of_place [n]: the row of each place; places are sorted by positions, largest first.
    """

    positions: np.ndarray
    row_of_place: np.ndarray
    num_rows: int
    _epochs: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @cached_property
    def places_by_row(self) -> tuple[np.ndarray, np.ndarray]:
        """(places sorted by their row [n], where each row begins in them [num_rows + 1])."""
        places = np.argsort(self.row_of_place, kind="stable")
        starts = np.searchsorted(self.row_of_place[places], np.arange(self.num_rows + 1))
        return places, starts

    @cached_property
    def num_positions(self) -> int:
        """Positions of all conversations in an epoch; the rest of the rows is padding."""
        return int(self.positions.sum())

    def shuffle(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(conversation of each place [n], row that is drawn first, second, ... [num_rows]) of an epoch."""
        # RandomState and not default_rng: numpy promises that its streams never change.
        generator = np.random.RandomState([seed, epoch])
        shuffled = generator.permutation(len(self.positions))
        # Conversations of equal length change places with each other only, so the rows stay as full.
        by_length = np.argsort(-self.positions[shuffled], kind="stable")
        return shuffled[by_length], generator.permutation(self.num_rows)

    def select(self, seed: int, sample: int) -> np.ndarray:
        """The conversations of a sample, in the order in which they lie in its row."""
        epoch, number = divmod(sample, self.num_rows)
        if (seed, epoch) not in self._epochs:
            while len(self._epochs) > 1:  # one batch may end an epoch and begin the next
                self._epochs.pop(min(self._epochs))
            self._epochs[seed, epoch] = self.shuffle(seed, epoch)
        conversations, rows = self._epochs[seed, epoch]
        places, starts = self.places_by_row
        row = int(rows[number])
        return conversations[places[starts[row] : starts[row + 1]]]


def plan_rows(lengths: np.ndarray, layout: RowLayout) -> RowPlan:
    """The rows for conversations of these lengths in tokens, each at least 2."""
    positions = layout.count_positions(lengths)
    sizes = np.sort(positions)[::-1]
    rows = fit_best(sizes, layout.seq_length) if layout.is_packed else np.arange(len(sizes))
    return RowPlan(positions, rows, int(rows.max()) + 1 if len(rows) else 0)


def fit_best(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each size: the fullest one that still has room, else a new one. sizes: [n], descending, <= capacity.

    Sizes that are equal, and rows with equal room, are treated together, so the cost depends on the number of
    different sizes more than on n.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    free: dict[int, list[int]] = {}  # rows by the room that they have left
    num_rows = place = 0
    values, counts = np.unique(-sizes, return_counts=True)
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        left = count
        for room in sorted(room for room in free if room >= size):
            # A row takes as many of this size as fit, before the next fullest is looked at.
            left, place = _fill(free, room, size, left, rows, place)
            if not left:
                break
        while left:
            num_new = -(-left // (capacity // size))
            free.setdefault(capacity, []).extend(range(num_rows, num_rows + num_new))
            num_rows += num_new
            left, place = _fill(free, capacity, size, left, rows, place)
    return rows


def _fill(free: dict[int, list[int]], room: int, size: int, left: int, rows: np.ndarray, place: int) -> tuple[int, int]:
    """Put up to `left` conversations of `size` into the rows that have `room` left; returns (left, next place)."""
    candidates = free.pop(room)
    fitting = room // size
    num_full = min(len(candidates), left // fitting)
    full, rest = candidates[:num_full], candidates[num_full:]
    rows[place : place + num_full * fitting] = np.repeat(full, fitting)
    place, left = place + num_full * fitting, left - num_full * fitting
    if full and room - fitting * size:
        free.setdefault(room - fitting * size, []).extend(full)
    if rest and left:  # fewer are left than one more row could take
        rows[place : place + left] = rest[0]
        free.setdefault(room - left * size, []).append(rest[0])
        place, left, rest = place + left, 0, rest[1:]
    if rest:
        free.setdefault(room, []).extend(rest)
    return left, place
