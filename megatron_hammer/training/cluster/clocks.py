"""How far the clocks of hosts differ, by messages through the launcher's store.

Rank 0 asks the first rank of each host for its time. The answer was given between question and arrival, so half the
round trip bounds the error; of several round trips the shortest counts.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

NUM_QUESTIONS = 8
TIMEOUT_S = 30.0


class Skew(NamedTuple):
    """The other clock less rank 0's, and how wrong that can be."""

    seconds: float
    error_s: float


def ask_clocks(store: Any, ranks: Sequence[int], clock: Callable[[], float] = time.time) -> dict[int, Skew]:
    """The skew of each rank's clock, on rank 0; each of the ranks runs answer_clock meanwhile."""
    return {
        rank: min((_ask(store, rank, number, clock) for number in range(NUM_QUESTIONS)), key=_error) for rank in ranks
    }


def answer_clock(store: Any, rank: int, clock: Callable[[], float] = time.time) -> None:
    """Answer the questions of rank 0."""
    for number in range(NUM_QUESTIONS):
        store.wait([f"clock/{rank}/{number}/question"])
        store.set(f"clock/{rank}/{number}/answer", repr(clock()))


def _ask(store: Any, rank: int, number: int, clock: Callable[[], float]) -> Skew:
    # The answer's difference is to a clock that may be set meanwhile; the round trip must not be.
    asked_at_s, started_at_s = clock(), time.perf_counter()
    store.set(f"clock/{rank}/{number}/question", b"")
    store.wait([f"clock/{rank}/{number}/answer"])
    round_trip_s = time.perf_counter() - started_at_s
    answer = float(store.get(f"clock/{rank}/{number}/answer"))
    return Skew(answer - (asked_at_s + round_trip_s / 2), round_trip_s / 2)


def _error(skew: Skew) -> float:
    return skew.error_s
