"""Signals and kills after a run's first checkpoint: what is saved, what is left, and how a shell sees it.

tests/unit/training/test_launch.py has the launcher alone; tests/distributed/test_resume.py sends SIGTERM to every
process, kills the launcher, and compares what the resumed runs compute.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.training_runs import (
    TOY_MODEL,
    TOY_SCHEDULE,
    read_lines,
    read_tracker,
    start,
    wait_until,
    wait_until_gone,
)

pytestmark = pytest.mark.distributed
NUM_STEPS = 5000  # more than a run gets to
GONE_WITHIN_S = 20.0  # less than the 30 s after which torchrun kills what does not end


def start_and_wait_for_a_save(save: Path, num_processes: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that has saved once, and every process under its launcher."""
    # A worker of the data loader is a process that a signal reaches, too.
    flags = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", str(NUM_STEPS), "--mock-data", "--num-workers", "1")
    process = start(num_processes, *flags, "--save", str(save), "--save-interval", "3")
    wait_until(lambda: read_tracker(save) > 0, process)
    return process, psutil.Process(process.pid).children(recursive=True)


def interrupt_twice(launcher: int, rank: int) -> None:
    os.killpg(launcher, signal.SIGINT)  # as a terminal does
    time.sleep(0.2)
    os.killpg(launcher, signal.SIGINT)


def hang_up_a_rank(launcher: int, rank: int) -> None:
    os.killpg(rank, signal.SIGHUP)


@pytest.mark.parametrize(
    ("stop", "exit_code"), [(interrupt_twice, 128 + signal.SIGINT), (hang_up_a_rank, 128 + signal.SIGHUP)]
)
def test_a_signal_after_the_first_save_saves_and_stops(
    tmp_path: Path, stop: Callable[[int, int], None], exit_code: int
) -> None:
    process, children = start_and_wait_for_a_save(tmp_path, 1)
    stop(process.pid, children[0].pid)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == exit_code, stderr[-3000:]
    assert "Traceback" not in stderr, stderr[-3000:]
    stopped_at = read_lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {stopped_at} of {NUM_STEPS}, saved to" in stdout
    assert read_tracker(tmp_path) == stopped_at
    assert wait_until_gone(children, GONE_WITHIN_S) == []


def test_nothing_lives_on_after_a_kill_of_a_rank(tmp_path: Path) -> None:
    """Nor holds stdout open, for which `launch ... | tee log` would wait."""
    process, children = start_and_wait_for_a_save(tmp_path, 2)
    ranks = [child for child in children if child.ppid() == process.pid]
    assert len(ranks) == 2
    assert len(children) > 2
    killed_at_s = time.monotonic()
    ranks[1].kill()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - killed_at_s < GONE_WITHIN_S
    assert wait_until_gone(children, GONE_WITHIN_S) == []
    assert process.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL after step" in stderr
