import argparse
import gc
import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, run
from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from megatron_hammer.training.supervision.launcher import rendezvous
from megatron_hammer.training.supervision.launcher.rendezvous import (
    NumberedNode,
    ObservedHeartbeats,
    RepeatedRendezvous,
    find_own_address,
    settle_rendezvous,
)


def settle(*options: str) -> argparse.Namespace:
    parsed = run.parse_args([*options, "train.py"])
    settle_rendezvous(parsed)
    run.config_from_args(parsed)  # torch accepts it
    return parsed


def test_a_run_on_one_node_needs_no_name_of_its_host() -> None:
    for options in ((), ("--standalone",), ("--nnodes", "1:1")):
        settled = settle(*options)
        assert (settled.rdzv_backend, settled.rdzv_endpoint, settled.local_addr) == ("c10d", "localhost:0", "localhost")
    assert settle().rdzv_id != settle().rdzv_id


def test_static_nodes_meet_at_the_address_of_node_0_and_keep_their_numbers() -> None:
    static = ("--nnodes", "3", "--master-addr", "host0", "--master-port", "1234", "--rdzv-conf", "timeout=9")
    first, last = settle(*static, "--node-rank", "0"), settle(*static, "--node-rank", "2")
    assert first.rdzv_backend == last.rdzv_backend == "c10d"
    assert first.rdzv_endpoint == last.rdzv_endpoint == "host0:1234"
    assert first.rdzv_conf == "read_timeout=30,timeout=9,is_host=True,node_rank=0"
    assert last.rdzv_conf == "read_timeout=30,timeout=9,is_host=False,node_rank=2"
    assert (first.local_addr, last.local_addr) == ("host0", None)


def test_other_rendezvous_are_left_as_they_are() -> None:
    settled = settle("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h:1", "--rdzv-id", "x")
    assert (settled.rdzv_backend, settled.rdzv_endpoint, settled.rdzv_id) == ("c10d", "h:1", "x")
    assert settled.rdzv_conf == ""


def test_numbers_order_the_nodes_and_not_their_addresses() -> None:
    nodes = [NumberedNode(1, "a", 7, 0), NumberedNode(0, "b", 9, 0)]
    assert [node.addr for node in sorted(nodes)] == ["b", "a"]


def test_the_own_address_is_the_one_towards_the_other_host() -> None:
    assert find_own_address("127.0.0.1:29500") == "127.0.0.1"
    if socket.has_dualstack_ipv6():
        assert find_own_address("[::1]:29500") == "::1"


def test_an_abandoned_rendezvous_waits_for_no_heartbeat_that_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the heartbeats then holds the last reference to it, and would have to wait for itself."""
    problems: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    is_asked, may_answer = threading.Event(), threading.Event()

    class SilentStore(RepeatedRendezvous):
        def _keep_alive(self) -> None:
            is_asked.set()
            assert may_answer.wait(60)

    store = HashStore()
    parameters = RendezvousParameters("c10d", "h:1", "run", 1, 1, keep_alive_interval=1)
    torchs: Any = create_handler(store, C10dRendezvousBackend(store, "run"), parameters)
    own: Any = SilentStore(torchs._this_node, torchs.settings, "c10d", store, torchs._state_holder)
    own._start_heartbeats()
    thread = own._keep_alive_timer._thread
    assert is_asked.wait(60)
    own.abandon()
    del own
    gc.collect()
    may_answer.set()
    thread.join(60)
    assert not thread.is_alive(), "it gives no other sign"
    assert problems == []


class Rendezvous:
    """The state that launchers share, as the launcher of node 0 sees it, with a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now_s = 100.0
        monkeypatch.setattr(rendezvous.time, "monotonic", lambda: self.now_s)
        store: Any = HashStore()
        self.backend = C10dRendezvousBackend(store, "run")
        parameters = RendezvousParameters("c10d", "h:1", "run", 2, 2)
        self.settings = create_handler(store, self.backend, parameters).settings
        self.nodes = [NumberedNode(number, f"host{number}", 7, 0) for number in range(2)]
        self.holder = ObservedHeartbeats(self.backend, self.settings, self.nodes[0])
        self.holder.state.participants = dict.fromkeys(self.nodes, 0)

    def write(self, *dates: datetime) -> None:
        """The heartbeats of both nodes, by the dates of their hosts."""
        self.holder.state.last_heartbeats = dict(zip(self.nodes, dates, strict=True))
        self.holder.mark_dirty()
        self.holder.sync()

    def find_present(self) -> set[int]:
        return {node.node_rank for node in self.holder.state.participants}


@pytest.mark.parametrize("offset", [timedelta(days=2), -timedelta(hours=3)])
def test_a_node_whose_date_is_wrong_is_there_as_long_as_its_heartbeat_changes(
    offset: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Rendezvous(monkeypatch)
    for beat in range(12):
        now = datetime.now(UTC)
        shared.write(now, now + offset + timedelta(seconds=5 * beat))
        shared.now_s += 5
    assert shared.find_present() == {0, 1}
    written = shared.holder.state.last_heartbeats
    assert written[shared.nodes[1]] == now + offset + timedelta(seconds=55), "as its own launcher has written it"
    shared.now_s += 5
    shared.write(datetime.now(UTC), written[shared.nodes[1]])
    assert shared.find_present() == {0, 1}
    shared.now_s += 6  # 16 s without a new one
    shared.write(datetime.now(UTC), written[shared.nodes[1]])
    assert shared.find_present() == {0}


def test_a_date_that_goes_back_does_not_stop_the_own_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Rendezvous(monkeypatch)
    context = SimpleNamespace(state=shared.holder.state, node=shared.nodes[0], settings=shared.settings)
    now = datetime.now(UTC)
    shared.write(now, now)
    context.state = shared.holder.state
    assert not dynamic_rendezvous._should_keep_alive(context), "it has just written one"
    shared.write(now + timedelta(hours=5), now)
    context.state = shared.holder.state
    assert dynamic_rendezvous._should_keep_alive(context)
