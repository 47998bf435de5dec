import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from megatron_hammer.training.supervision.launcher import watch
from megatron_hammer.training.supervision.launcher.hangs import Hang, HangLimit
from megatron_hammer.training.supervision.launcher.watch import Place, RunWatch, build_views, is_stopped
from megatron_hammer.training.supervision.progress import RankProgress


class MemoryStore:
    """What launchers use of torch's store."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


class Node:
    """A launcher with one rank, which is this process; nothing is killed."""

    def __init__(self, number: int, *, ends_hangs: bool = False):
        self.record = RankProgress(step=9, num_waits=3, changed_at_s=0.0, phase="training", is_waiting=True)
        self.hangs: list[Hang] = []
        self.reasons: list[str] = []
        self.exit_code: int | None = None
        place = Place(node=number, num_nodes=2, host=f"host{number}", ranks=[number])
        limit = HangLimit(timeout_s=600.0, fixed_s=100.0)
        self.watch = RunWatch(place, self.read_records, limit, self.hangs.append, self.note, ends_hangs=ends_hangs)

    def note(self, reason: str, exit_code: int | None) -> None:
        self.reasons.append(reason)
        self.exit_code = exit_code

    def read_records(self) -> Mapping[int, RankProgress]:
        return {0: self.record}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time]; no signal leaves this process."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watch.os, "kill", lambda pid, number: None)
    return now


def look(clock: list[float], store: MemoryStore, *nodes: Node, moved: bool) -> None:
    clock[0] += 5.0
    for node in nodes:
        if moved:
            node.record = RankProgress(
                step=node.record.step + 1, num_waits=3, changed_at_s=clock[0], phase="training", is_waiting=True
            )
        node.watch.look({0: os.getpid()}, store)


def test_node_0_names_a_rank_of_another_node_and_all_nodes_end(clock: list[float]) -> None:
    store, nodes = MemoryStore(), [Node(0, ends_hangs=True), Node(1, ends_hangs=True)]
    for _ in range(3):
        look(clock, store, *nodes, moved=True)
    nodes[1].record = RankProgress(step=12, num_waits=3, changed_at_s=clock[0], phase="saving", is_waiting=False)
    for _ in range(25):
        look(clock, store, *nodes, moved=False)
    (hang,) = nodes[0].hangs
    assert "rank 1 on host1" in hang.message
    assert nodes[1].hangs == [], "one node says it"
    assert hang.message in nodes[0].reasons
    assert hang.message in nodes[1].reasons


def test_a_node_that_is_not_heard_of_ends_the_attempt(clock: list[float]) -> None:
    store, nodes = MemoryStore(), [Node(0), Node(1)]
    look(clock, store, *nodes, moved=True)
    for _ in range(8):
        look(clock, store, nodes[0], moved=True)
    (hang,) = nodes[0].hangs
    assert "node 1 (host1) has not been heard of for 30 s" in hang.message
    assert nodes[0].reasons[0] == hang.message


@pytest.mark.parametrize(("ending", "told"), [(0, 1), (1, 0)])
def test_every_node_hears_that_another_one_ends_the_run(clock: list[float], ending: int, told: int) -> None:
    store, nodes = MemoryStore(), [Node(0), Node(1)]
    look(clock, store, *nodes, moved=True)
    nodes[ending].watch.stop_all(store, "lr: must be positive", 2)
    look(clock, store, nodes[told], moved=True)
    assert (nodes[told].reasons, nodes[told].exit_code) == (["lr: must be positive"], 2)


def test_a_hang_that_passes_may_be_reported_again(clock: list[float]) -> None:
    store, node = MemoryStore(), Node(0)
    node.watch = RunWatch(
        Place(node=0, num_nodes=1, host="host0", ranks=[0]), node.read_records, HangLimit(600.0, 20.0),
        node.hangs.append, node.note, ends_hangs=False,
    )  # fmt: skip
    for moved in (True, *[False] * 8, True, *[False] * 8):
        look(clock, store, node, moved=moved)
    assert len(node.hangs) == 2
    assert node.reasons == [], "nothing is ended unless asked for"


def test_a_stopped_process_is_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline_s = time.monotonic() + 60
        while not is_stopped(process.pid) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert is_stopped(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)


def test_ranks_without_a_record_or_a_process_are_left_out() -> None:
    record = RankProgress(step=9, num_waits=3, changed_at_s=5.0, phase="training", is_waiting=True)
    place = Place(node=1, num_nodes=2, host="h", ranks=[8, 9, 10])
    views = build_views(place, {0: record, 1: record}, {1: os.getpid(), 2: os.getpid()}, 7.0)
    assert [(view.rank, view.age_s) for view in views] == [(9, 2.0)]
