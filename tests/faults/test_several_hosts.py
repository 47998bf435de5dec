"""Runs across hosts with a network of their own (tests/helpers/hosts.py), which lose hosts, packets and each other.

Each ends in resumed training that is bit for bit an undisturbed run, or in a sentence within a stated time.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hosts import Host, several_hosts
from tests.helpers.launched_runs import LaunchedRun, read_events, wait_for_step, wait_until
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_lines, write_toy_data

pytestmark = pytest.mark.distributed
NUM_STEPS = 12
SAVE_INTERVAL = 3
EXACT = ("step", "loss", "grad_norm", "lr", "num_samples", "is_skipped")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with several_hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data = write_toy_data(tmp_path_factory.mktemp("data") / "data", num_documents=25)
    schedule = ("--train-iters", str(NUM_STEPS), "--save-interval", str(SAVE_INTERVAL), "--global-batch-size", "12")
    return (*TOY_MODEL, *TOY_SCHEDULE, "--hidden-dropout", "0.1", *schedule, "--data-path", data, "--split", "100,0,0")


class Cluster:
    """The launchers of one run, one on each host; node 0's host holds the rendezvous."""

    def __init__(self, hosts: Sequence[Host], flags: Sequence[str], save_dir: Path, *options: str):
        place = ("--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--max-restarts", "4")
        self._options = (*place, "--master-addr", hosts[0].address, *options)
        self._training = ("--", *flags, "--save", str(save_dir))
        self.hosts, self.save_dir = hosts, save_dir
        self.runs = [self.launch(node) for node in range(len(hosts))]

    def launch(self, node: int) -> LaunchedRun:
        return self.hosts[node].launch(*self._options, "--node-rank", str(node), *self._training)

    def lose_and_bring_back(self, node: int, away_s: float = 2.0) -> None:
        """Returns when all nodes have started again; prints how long that took after the host's return."""
        num_started = len(self.read_started())
        self.hosts[node].fail()
        time.sleep(away_s)
        self.hosts[node].come_back()
        returned_at_s = time.monotonic()
        self.runs[node] = self.launch(node)
        wait_until(lambda: len(self.read_started()) == num_started + len(self.hosts), run=self.runs[node])
        print(f"host {node} of {len(self.hosts)}: resumed {time.monotonic() - returned_at_s:.1f} s after its return")

    def read_started(self) -> list[dict[str, Any]]:
        return read_events(self.save_dir, "attempt-started")

    def finish(self) -> list[tuple[Any, ...]]:
        """Wait for the end of all launchers, which must be good; returns the run's steps."""
        codes = [run.wait() for run in self.runs]
        logs = "\n".join(run.log for run in self.runs)
        assert codes == [0] * len(codes), logs
        assert "Traceback" not in logs
        return read_exact(self.save_dir)


def read_exact(save_dir: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in EXACT) for line in read_lines(save_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(
    hosts: list[Host], flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Any, ...]]:
    """The steps of a run across two hosts."""
    cluster = Cluster(hosts[:2], flags, tmp_path_factory.mktemp("undisturbed"))
    steps = cluster.finish()
    started = cluster.read_started()
    assert sorted((event["host"], event["ranks"]) for event in started) == [("host-0", [0]), ("host-1", [1])]
    assert [step for step, *_ in steps] == list(range(1, NUM_STEPS + 1))
    return steps


def test_a_lost_host_is_brought_back(
    hosts: list[Host], flags: tuple[str, ...], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    cluster = Cluster(hosts[:2], flags, tmp_path)
    wait_for_step(cluster.runs[0], tmp_path, SAVE_INTERVAL + 2)
    cluster.lose_and_bring_back(1)
    assert cluster.finish() == undisturbed


@pytest.mark.long
def test_two_hosts_survive_ten_losses(hosts: list[Host], flags: tuple[str, ...], tmp_path: Path) -> None:
    """Of the one with the rendezvous and the other by turns."""
    longer = (*flags, "--train-iters", str(11 * SAVE_INTERVAL + 3))
    expected = Cluster(hosts[:2], longer, tmp_path / "undisturbed").finish()
    cluster = Cluster(hosts[:2], longer, tmp_path / "lossy")
    for loss in range(10):
        wait_for_step(cluster.runs[loss % 2], cluster.save_dir, SAVE_INTERVAL * (loss + 1) + 1)
        cluster.lose_and_bring_back(loss % 2)
    assert cluster.finish() == expected


@pytest.mark.long
def test_three_hosts_survive_the_loss_of_any(hosts: list[Host], flags: tuple[str, ...], tmp_path: Path) -> None:
    expected = Cluster(hosts, flags, tmp_path / "undisturbed").finish()
    cluster = Cluster(hosts, flags, tmp_path / "lossy")
    for node in (2, 0):
        wait_for_step(cluster.runs[1], cluster.save_dir, SAVE_INTERVAL * (2 if node else 3) - 1)
        cluster.lose_and_bring_back(node)
    assert cluster.finish() == expected


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_stays_away_ends_the_run_with_its_number(
    hosts: list[Host], flags: tuple[str, ...], lost: int, tmp_path: Path
) -> None:
    """After 30 s of silence, the rejoin_timeout and at most 60 s for connections and processes to end."""
    cluster = Cluster(hosts[:2], flags, tmp_path, "--rdzv-conf", "rejoin_timeout=10")
    wait_for_step(cluster.runs[0], tmp_path, SAVE_INTERVAL + 2)
    hosts[lost].fail()
    lost_at_s = time.monotonic()
    left = cluster.runs[1 - lost]
    try:
        assert left.wait(30 + 10 + 60) == 1, left.log
    finally:
        hosts[lost].come_back()
    print(f"ended {time.monotonic() - lost_at_s:.1f} s after the loss of host {lost}")
    check_last_words(left, lost, hosts[0].address)


def check_last_words(left: LaunchedRun, lost: int, first_address: str) -> None:
    """The last line on the terminal names the node that is missing."""
    assert "Traceback" not in left.log, left.log
    *_, last = left.log.strip().splitlines()
    if lost == 0:
        assert last.startswith(f"error: nodes: the launcher of node 0 must answer at {first_address}:"), left.log
    else:
        assert last.startswith("error: nodes: all 2 must be there, got 1 within 10 s: missing node 1."), left.log


@pytest.mark.long
def test_a_slow_link_that_loses_packets_changes_nothing(
    flags: tuple[str, ...], undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with several_hosts(2) as slow:
        for host in slow:
            host.slow_down(20_000)
            host.lose_packets(0.03)
        cluster = Cluster(slow, flags, tmp_path)
        assert cluster.finish() == undisturbed
        assert len(cluster.read_started()) == 2, "no restart was needed"
        assert all(host.count_lost_packets() for host in slow)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [5, 50])
def test_a_partition_that_heals_changes_nothing(
    hosts: list[Host], flags: tuple[str, ...], undisturbed: list[tuple[Any, ...]], seconds: int, tmp_path: Path
) -> None:
    """A short one is a pause; after a longer one, every launcher has missed the other, and they meet again."""
    cluster = Cluster(hosts[:2], flags, tmp_path)
    wait_for_step(cluster.runs[0], tmp_path, SAVE_INTERVAL + 2)
    hosts[1].part()
    try:
        time.sleep(seconds)
    finally:
        hosts[1].heal()
    healed_at_s = time.monotonic()
    if seconds > 30:
        wait_until(lambda: len(cluster.read_started()) >= 4, run=cluster.runs[1])
        print(f"resumed {time.monotonic() - healed_at_s:.1f} s after a partition of {seconds} s")
    assert cluster.finish() == undisturbed
    lost = read_events(tmp_path, "node-lost", "hang")
    assert {event["host"] for event in lost} == (set() if seconds < 30 else {"host-0", "host-1"}), lost


@pytest.mark.long
def test_a_partition_that_stays_ends_both_parts(hosts: list[Host], flags: tuple[str, ...], tmp_path: Path) -> None:
    cluster = Cluster(hosts[:2], flags, tmp_path, "--rdzv-conf", "rejoin_timeout=10")
    wait_for_step(cluster.runs[0], tmp_path, SAVE_INTERVAL + 2)
    hosts[1].part()
    parted_at_s = time.monotonic()
    try:
        assert [run.wait(30 + 10 + 60) for run in cluster.runs] == [1, 1]
    finally:
        hosts[1].heal()
    print(f"ended {time.monotonic() - parted_at_s:.1f} s after the partition")
    for node, run in enumerate(cluster.runs):
        check_last_words(run, 1 - node, hosts[0].address)
    (silence,) = read_events(tmp_path, "hang")
    assert silence["message"].startswith("node 1 (host-1) has not been heard of for 30 s"), silence
