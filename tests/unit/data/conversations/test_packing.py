"""Rows hold every conversation once an epoch, none more than fits, in an order that only seed and epoch decide."""

import itertools

import numpy as np
import pytest

from megatron_hammer.data.conversations.packing import RowLayout, RowPlan, fit_best, plan_rows

SIZE = 32
PACKED = RowLayout(seq_length=SIZE, is_packed=True, is_truncated=False)
LENGTHS = np.random.default_rng(2).integers(2, SIZE + 2, 300)


def read_epoch(plan: RowPlan, epoch: int, seed: int = 7) -> list[list[int]]:
    first = epoch * plan.num_rows
    return [plan.select(seed, first + row).tolist() for row in range(plan.num_rows)]


def fill_one_by_one(sizes: list[int]) -> list[int]:
    """Best fit as its definition says it: the number of conversations in each row, sorted."""
    rooms: list[int] = []
    counts: list[int] = []
    for size in sizes:
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(SIZE)
            counts.append(0)
            fitting = [(SIZE, len(rooms) - 1)]
        row = min(fitting)[1]
        rooms[row] -= size
        counts[row] += 1
    return sorted(counts)


def test_an_epoch_has_every_conversation_once_and_no_row_is_overfull() -> None:
    plan = plan_rows(LENGTHS, PACKED)
    for epoch in (0, 1, 5):
        rows = read_epoch(plan, epoch)
        assert sorted(itertools.chain(*rows)) == list(range(len(LENGTHS)))
        assert max(sum(LENGTHS[row] - 1) for row in rows) <= SIZE
    assert plan.num_positions / (plan.num_rows * SIZE) > 0.95


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_filled_by_best_fit(seed: int) -> None:
    sizes = np.sort(np.random.default_rng(seed).integers(1, SIZE + 1, 60))[::-1]
    rows = fit_best(sizes, SIZE)
    assert (np.bincount(rows, weights=sizes) <= SIZE).all()
    assert len(np.bincount(rows)) == len(fill_one_by_one(sizes.tolist()))


def test_a_seed_and_an_epoch_decide_the_order_and_nothing_else() -> None:
    plan = plan_rows(LENGTHS, PACKED)
    epochs = [read_epoch(plan, epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert read_epoch(plan_rows(LENGTHS, PACKED), 1) == epochs[1]  # as after a restart, without epoch 0 before it
    assert read_epoch(plan, 0, seed=8) != epochs[0]
    # Other conversations share a row in another epoch.
    assert {tuple(sorted(row)) for row in epochs[0]} != {tuple(sorted(row)) for row in epochs[1]}


def test_the_numbers_of_an_order_stay_what_they_are() -> None:
    """Runs resume in this order, so no version may change it."""
    plan = plan_rows(np.array([5, 9, 33, 12, 3, 20, 9]), PACKED)
    assert read_epoch(plan, 0) == [[5, 3, 4], [2], [1, 6, 0]]


def test_one_conversation_in_each_row() -> None:
    plan = plan_rows(LENGTHS, RowLayout(seq_length=SIZE, is_packed=False, is_truncated=False))
    assert plan.num_rows == len(LENGTHS)
    assert sorted(itertools.chain(*read_epoch(plan, 0))) == list(range(len(LENGTHS)))


def test_positions_are_rounded_up_for_context_parallelism() -> None:
    layout = RowLayout(seq_length=SIZE, is_packed=True, is_truncated=True, granularity=4)
    assert layout.count_positions(np.array([2, 5, 6, 33, 90])).tolist() == [4, 4, 8, 32, 32]
    assert layout.is_too_long(np.array([2, 33, 34])).tolist() == [False, False, True]
    assert layout.description == "packed conversations, cut to fit, in multiples of 4 positions"
    plan = plan_rows(LENGTHS, layout)
    rows = read_epoch(plan, 0)
    assert max(sum(layout.count_positions(LENGTHS[row])) for row in rows) <= SIZE
