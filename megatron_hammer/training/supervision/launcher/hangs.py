"""Which rank holds up a run that does not move, from what all ranks last recorded. Pure.

A run hangs where nothing changes on any rank: one rank that stops makes all others wait for it in a collective. Long
before the collective times out, the ranks that do not wait, or are behind the others, can be told from those that do.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

STOPPED_LIMIT_S = 10.0  # a stopped process is no accident of timing
LEAST_LIMIT_S = 60.0
STEPS_PER_LIMIT = 10  # a step that takes as long as ten does not end
_TIMEOUT_FRACTION = 0.5  # of the collective timeout, so that the report comes first
_MOST_NAMED = 4
# Their length depends on data and storage: a hang there is reported late, and ends no attempt.
UNBOUNDED_PHASES = ("starting", "building the model", "building the data")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankView:
    """The record of one rank. age_s: since it changed. is_stopped: by SIGSTOP or a terminal."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    is_waiting: bool
    num_waits: int
    age_s: float
    is_stopped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """behind: the ranks that the others wait for; empty where all wait equally."""

    message: str
    behind: Sequence[RankView]
    hosts: Sequence[str]


class HangLimit:
    """How long a run may stand still, from its own steps. timeout_s: of its collectives. fixed_s: the user's choice."""

    def __init__(self, timeout_s: float, fixed_s: float | None = None):
        self._timeout_s, self._fixed_s = timeout_s, fixed_s
        self._step, self._stepped_at_s = 0, 0.0
        self._step_times_s: deque[float] = deque(maxlen=20)

    def note_step(self, step: int, now_s: float) -> None:
        """step: the last one that any rank has finished."""
        if step <= self._step:
            return
        if self._step:
            self._step_times_s.append((now_s - self._stepped_at_s) / (step - self._step))
        self._step, self._stepped_at_s = step, now_s

    def find_limit_s(self, phase: str) -> float:
        most_s = self._timeout_s * _TIMEOUT_FRACTION
        if phase in UNBOUNDED_PHASES:
            return most_s
        if self._fixed_s is not None:
            return self._fixed_s
        if phase != "training" or not self._step_times_s:
            return most_s
        return min(most_s, max(LEAST_LIMIT_S, STEPS_PER_LIMIT * max(self._step_times_s)))


def find_hang(views: Sequence[RankView], limit: HangLimit) -> Hang | None:
    """None while the run moves, as far as can be seen."""
    stopped = [view for view in views if view.is_stopped and view.age_s >= STOPPED_LIMIT_S]
    if stopped:
        pids = " ".join(str(view.pid) for view in stopped)
        message = (
            f"{_name(stopped)} is stopped, as by SIGSTOP, so all others wait for it. Continue it: kill -CONT {pids}"
        )
        return _build(message, stopped)
    if not views:
        return None
    still_s = min(view.age_s for view in views)
    if still_s < max(limit.find_limit_s(view.phase) for view in views):
        return None
    behind = find_behind(views)
    if not behind:
        message = (
            f"for {still_s:.0f} s all ranks have waited in a collective, and none is behind: the network between "
            f"{', '.join(sorted({view.host for view in views}))} does not pass on data. Check its links and cards"
        )
        return _build(message, [])
    message = (
        f"nothing has moved for {still_s:.0f} s, and {_name(behind)} is behind. The stacks of all ranks are in their "
        "logs now; look at that rank's, and at its GPU, disk and network"
    )
    return _build(message, behind)


def find_behind(views: Sequence[RankView]) -> list[RankView]:
    """The ranks that the others wait for: not in a collective while others are, else those that have done less."""
    busy = [view for view in views if not view.is_waiting]
    if busy and len(busy) < len(views):
        return busy
    done = [(view.step, view.num_waits) for view in views]
    if len(set(done)) == 1:
        return []
    return [view for view, value in zip(views, done, strict=True) if value == min(done)]


def _name(views: Sequence[RankView]) -> str:
    """rank 3 on host7 (process 812, after step 57, saving)"""
    named = [
        f"rank {view.rank} on {view.host} (process {view.pid}, after step {view.step}, {view.phase})"
        for view in views[:_MOST_NAMED]
    ]
    more = f" and {len(views) - _MOST_NAMED} more" if len(views) > _MOST_NAMED else ""
    return ", ".join(named) + more


def _build(message: str, behind: Sequence[RankView]) -> Hang:
    return Hang(message=message, behind=behind, hosts=sorted({view.host for view in behind}))
