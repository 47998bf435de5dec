"""Two runs on one --save: the second is refused by name before it writes anything, and a killed one blocks nobody."""

import os
from pathlib import Path

import pytest

from megatron_hammer.training.saving.lock import RunLock
from tests.helpers.messages import assert_errors
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_tracker, run

pytestmark = pytest.mark.distributed
FLAGS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "4", "--mock-data")


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    first = RunLock(tmp_path)  # of another process than the ranks below
    second = run(2, *FLAGS, "--save", str(tmp_path))
    assert second.returncode == 2, second.stderr[-3000:]
    assert_errors(
        second.stderr, ("save:", "one run at a time", f"process {os.getpid()} on host", "pass another --save")
    )
    assert read_tracker(tmp_path) == 0
    first.release()
    third = run(2, *FLAGS, "--save", str(tmp_path))
    assert third.returncode == 0, third.stderr[-3000:]
    assert read_tracker(tmp_path) == 4
