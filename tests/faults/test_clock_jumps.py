"""The date of a host is wrong, or jumps: a run measures its waits on other clocks, and nothing changes."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.launched_runs import find_free_port, read_events
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, environment, read_lines

LIBRARY = importlib.util.find_spec("libfaketime")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.long,
    pytest.mark.skipif(LIBRARY is None, reason="libfaketime is missing; pip install libfaketime"),
]
SAVE_INTERVAL, NUM_STEPS = 40, 160
TIMEOUT_S = 300  # of each wait; four launchers start as programs of their own
FLAGS = (
    *TOY_MODEL, *TOY_SCHEDULE, "--mock-data", "--tensor-model-parallel-size", "2", "--train-iters", str(NUM_STEPS),
    "--save-interval", str(SAVE_INTERVAL),
)  # fmt: skip
EXACT = ("step", "loss", "grad_norm", "lr")


class HostClock:
    """What the processes of one host take for the date: the real one and an offset, which may change at any time."""

    def __init__(self, path: Path, offset: str):
        self.path = path
        self.set(offset)

    def set(self, offset: str) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(offset)
        partial.replace(self.path)  # it is read all the time

    @property
    def environment(self) -> dict[str, str]:
        assert LIBRARY is not None
        assert LIBRARY.origin is not None
        library = Path(LIBRARY.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.path),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",  # a host's date jumps, its time since the start does not
        }


def launch(node: int, port: int, save_dir: Path, clock: HostClock) -> "subprocess.Popen[str]":
    place = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost", "--master-port", str(port))
    command = (sys.executable, "-m", "megatron_hammer.training.launch", *place, "--nproc-per-node", "1")
    return subprocess.Popen(
        [*command, "--max-restarts", "1", "--", *FLAGS, "--save", str(save_dir)],
        env=environment() | clock.environment,
        stdout=(save_dir.with_name(f"{save_dir.name}-{node}.log")).open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def count_steps(save_dir: Path) -> int:
    path = save_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def train(save_dir: Path, clocks: list[HostClock], disturb: Callable[[], None]) -> list[tuple[object, ...]]:
    """The steps of a run of two hosts, of which one loses its rank. disturb: called before that, amid the steps."""
    port = find_free_port()
    launchers = [launch(node, port, save_dir, clock) for node, clock in enumerate(clocks)]
    try:
        wait(lambda: count_steps(save_dir) > SAVE_INTERVAL)
        disturb()
        seen = count_steps(save_dir)
        wait(lambda: count_steps(save_dir) > seen + 5)
        (rank,) = psutil.Process(launchers[1].pid).children()
        rank.kill()
        assert [launcher.wait(TIMEOUT_S) for launcher in launchers] == [0, 0]
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
    return [tuple(line[name] for name in EXACT) for line in read_lines(save_dir / "metrics.jsonl")]


def test_dates_that_differ_and_jump_change_nothing(tmp_path: Path) -> None:
    right = [HostClock(tmp_path / f"right-{node}", "+0") for node in range(2)]
    wrong = [HostClock(tmp_path / f"wrong-{node}", offset) for node, offset in enumerate(("+0", "+5h"))]

    def jump() -> None:
        wrong[0].set("+2d")
        wrong[1].set("-3h")

    expected = train(tmp_path / "right", right, lambda: None)
    found = train(tmp_path / "wrong", wrong, jump)
    assert found == expected
    assert [step for step, *_ in found] == list(range(1, NUM_STEPS + 1))
    assert read_events(tmp_path / "wrong", "hang", "node-lost") == []
    days = {event["time"][:10] for event in read_events(tmp_path / "wrong")}
    assert len(days) > 1, "the dates of the events are those of the hosts"
    assert all(0 < line["step_time_s"] < TIMEOUT_S for line in read_lines(tmp_path / "wrong" / "metrics.jsonl"))
    assert not os.environ.get("LD_PRELOAD")
