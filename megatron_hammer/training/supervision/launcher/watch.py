"""Looks after the ranks of a run while they run: each launcher after its own, and node 0's after all of them.

Launchers exchange what their ranks have recorded through the store of their rendezvous, a few hundred bytes every two
seconds. Silence is measured with each host's own clock, so neither wrong clocks nor a change of the date matter.
"""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_hammer.training.supervision.launcher.hangs import UNBOUNDED_PHASES, Hang, HangLimit, RankView, find_hang
from megatron_hammer.training.supervision.progress import STACKS_SIGNAL, RankProgress

INTERVAL_S = 2.0
NODE_SILENCE_S = 30.0
_PREFIX = "hammer/node/"
_ORDER = "hammer/order"


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One launcher among those of a run. ranks: its own, by local rank."""

    node: int
    num_nodes: int
    host: str
    ranks: Sequence[int]


class RunWatch:
    """Of one attempt. read_records: of this node's ranks. report: called once for each hang, on node 0.

    end: called on every node before its ranks are killed, with the reason and, if the whole run ends, the exit code.
    ends_hangs: whether a hang ends the attempt; the silence of a whole node always does.
    """

    def __init__(
        self,
        place: Place,
        read_records: Callable[[], Mapping[int, RankProgress]],
        limit: HangLimit,
        report: Callable[[Hang], None],
        end: Callable[[str, int | None], None],
        *,
        ends_hangs: bool,
    ):
        self._place, self._read_records, self._limit, self._report = place, read_records, limit, report
        self._end = end
        self._ends_hangs = ends_hangs
        self._looked_at_s = 0.0
        self._count = 0
        self._heard: dict[int, tuple[bytes, float]] = {}  # by node: what it last published, and when
        self._has_reported = self._has_dumped = False

    def look(self, pids: Mapping[int, int], store: Store) -> None:
        """Called many times per second; pids: of the running ranks, by local rank."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s < INTERVAL_S:
            return
        self._looked_at_s = now_s
        own = build_views(self._place, self._read_records(), pids, now_s)
        order = self._judge(own, now_s) if self._place.num_nodes == 1 else self._exchange(own, store, now_s)
        if order is not None:
            self._obey(order, pids)

    def stop_all(self, store: Store, reason: str, exit_code: int) -> None:
        """Have the launchers of all other nodes end the run with this code: no restart helps."""
        store.set(_ORDER, f"stop {exit_code}\n{reason}")

    def _exchange(self, own: Sequence[RankView], store: Store, now_s: float) -> str | None:
        """Publish this node's views; on node 0 judge those of all. Returns the order that node 0 gave."""
        self._count += 1
        text = json.dumps([self._count, self._place.host, [dataclasses.asdict(view) for view in own]])
        store.set(f"{_PREFIX}{self._place.node}", text)
        given = store.get(_ORDER).decode() if store.check([_ORDER]) else None
        if self._place.node != 0 or (given is not None and given.startswith("stop")):
            return given
        views = list(own)
        for node in range(1, self._place.num_nodes):
            views += self._hear(node, store, now_s)
        order = self._find_silent(now_s) or self._judge(views, now_s)
        if order is not None:
            store.set(_ORDER, order)
        return order

    def _hear(self, node: int, store: Store, now_s: float) -> list[RankView]:
        key = f"{_PREFIX}{node}"
        if not store.check([key]):
            return []
        text = store.get(key)
        if node not in self._heard or self._heard[node][0] != text:
            self._heard[node] = text, now_s
        _, _, views = json.loads(text)
        silent_s = now_s - self._heard[node][1]
        return [RankView(**{**view, "age_s": view["age_s"] + silent_s}) for view in views]

    def _find_silent(self, now_s: float) -> str | None:
        silent = [node for node, (_, heard_at_s) in self._heard.items() if now_s - heard_at_s > NODE_SILENCE_S]
        if not silent:
            return None
        hosts = sorted({str(json.loads(self._heard[node][0])[1]) for node in silent})
        message = (
            f"{', '.join(f'node {node}' for node in silent)} ({', '.join(hosts)}) has not been heard of for "
            f"{NODE_SILENCE_S:.0f} s: the host, its launcher or the network to it is gone"
        )
        if not self._has_reported:
            self._has_reported = True
            self._report(Hang(message=message, behind=[], hosts=hosts))
        return f"end\n{message}"

    def _judge(self, views: Sequence[RankView], now_s: float) -> str | None:
        self._limit.note_step(max((view.step for view in views), default=0), now_s)
        hang = find_hang(views, self._limit)
        if hang is None:
            self._has_reported = self._has_dumped = False
            return None
        if not self._has_reported:
            self._has_reported = True
            self._report(hang)
        is_bounded = not any(view.phase in UNBOUNDED_PHASES for view in hang.behind or views)
        return f"{'end' if self._ends_hangs and is_bounded else 'stacks'}\n{hang.message}"

    def _obey(self, order: str, pids: Mapping[int, int]) -> None:
        if not self._has_dumped:
            self._has_dumped = True
            for local_rank, record in self._read_records().items():
                if record.phase != "starting" and local_rank in pids:  # before, the signal would end the rank
                    os.kill(pids[local_rank], STACKS_SIGNAL)
        action, _, reason = order.partition("\n")
        action, _, code = action.partition(" ")
        if action in ("end", "stop"):
            self._end(reason, int(code) if action == "stop" else None)
            time.sleep(0.5)  # for the stacks
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)


def build_views(
    place: Place, records: Mapping[int, RankProgress], pids: Mapping[int, int], now_s: float
) -> list[RankView]:
    """Of this node's ranks that have begun a record and still run."""
    return [
        RankView(
            rank=place.ranks[local_rank],
            host=place.host,
            pid=pids[local_rank],
            step=record.step,
            phase=record.phase,
            is_waiting=record.is_waiting,
            num_waits=record.num_waits,
            age_s=max(0.0, now_s - record.changed_at_s),
            is_stopped=is_stopped(pids[local_rank]),
        )
        for local_rank, record in sorted(records.items())
        if local_rank in pids
    ]


def is_stopped(pid: int) -> bool:
    """Whether the kernel has stopped the process on a signal; one that a debugger holds is not meant."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[:1] == ["T"]


def describe_hang(hang: Hang) -> dict[str, Any]:
    """The fields of its event."""
    return {
        "hosts": list(hang.hosts),
        "ranks": [view.rank for view in hang.behind],
        "phases": sorted({view.phase for view in hang.behind}),
    }
