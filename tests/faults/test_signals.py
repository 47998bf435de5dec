"""Signals and kills after a run's first checkpoint: what is saved, what is left, and how a shell sees it.

tests/unit/training/test_launch.py has the launcher alone; tests/distributed/test_resume.py sends SIGTERM to every
process, kills the launcher, and compares what the resumed runs compute.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers import launched_runs
from tests.helpers.launched_runs import LaunchedRun
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


# A worker of the data loader is a process that a signal reaches, too.
FLAGS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", str(NUM_STEPS), "--mock-data", "--num-workers", "1")
SAVES = ("--save-interval", "3", "--save")


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
    run = LaunchedRun("--standalone", "--nproc-per-node", "1", "--", *FLAGS, *SAVES, str(tmp_path))
    launched_runs.wait_until(lambda: read_tracker(tmp_path) > 0, run=run)
    children = psutil.Process(run.pid).children(recursive=True)
    stop(run.pid, run.list_ranks()[0].pid)
    assert run.wait() == exit_code, run.log[-3000:]
    assert "Traceback" not in run.log, run.log[-3000:]
    stopped_at = read_lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {stopped_at} of {NUM_STEPS}, saved to" in run.log
    assert read_tracker(tmp_path) == stopped_at
    assert wait_until_gone(children, GONE_WITHIN_S) == []


def test_nothing_lives_on_after_a_kill_of_a_rank(tmp_path: Path) -> None:
    """Nor holds stdout open, for which `launch ... | tee log` would wait."""
    process = start(2, *FLAGS, *SAVES, str(tmp_path))
    wait_until(lambda: read_tracker(tmp_path) > 0, process)
    children = psutil.Process(process.pid).children(recursive=True)
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


SLOW_DATA = """
import os, time
from megatron.training import training

def build(*arguments, **options):
    open(os.environ["BEGUN"], "w").close()
    time.sleep(60)

training.build_train_valid_test_datasets = build
"""


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path) -> None:
    """There is nothing to save, and megatron would first build everything and train a step."""
    (tmp_path / "slow.py").write_text(SLOW_DATA)
    begun, save = tmp_path / "begun", tmp_path / "run"
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "--")
    flags = (*FLAGS, *SAVES, str(save))
    run = LaunchedRun(*options, *flags, before_rank=str(tmp_path / "slow.py"), BEGUN=str(begun))
    launched_runs.wait_until(begun.exists, run=run)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(30) == 128 + signal.SIGTERM, run.log
    assert list(save.glob("iter_*")) == []
    assert "Traceback" not in run.log
