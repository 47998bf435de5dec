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
