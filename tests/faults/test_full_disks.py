"""Disks that are full, read-only or gone under a run, and terminals: one sentence, or none, and no traceback."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.messages import assert_errors
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_tracker, run, run_program

pytestmark = pytest.mark.distributed
FAILING_DISKS, LATE_WRITES = (ROOT / "tests" / "helpers" / f"{name}.py" for name in ("failing_disks", "late_writes"))
FLAGS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "5", "--save-interval", "2", "--mock-data")


@pytest.fixture(scope="module")
def _may_mount() -> None:
    probe = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"needs the permission to mount, as root has it: {probe.stderr.decode().strip()}")


@pytest.fixture
def small_disk(tmp_path: Path, _may_mount: None) -> Iterator[Path]:
    """Room for one checkpoint of 8 MB, and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_no_checkpoint_is_begun_without_room_for_it(small_disk: Path) -> None:
    result = run(1, *FLAGS, "--save", str(small_disk))
    assert result.returncode == 2, result.stderr[-3000:]
    assert_errors(result.stderr, ("save:", "must have room for a checkpoint", "GiB free", "pass another --save"))
    assert read_tracker(small_disk) == 2
    again = run(1, *FLAGS, "--save", str(small_disk))
    assert again.returncode == 2
    assert_errors(again.stderr, ("save:", "must have room for a checkpoint"))  # now before the run starts


def test_a_disk_that_fills_during_a_write_is_named_by_rank_and_file(tmp_path: Path) -> None:
    result = run_program(LATE_WRITES, 2, *FLAGS, "--save", str(tmp_path), WRITES="full")
    assert result.returncode == 2, result.stderr[-3000:]
    assert_errors(
        result.stderr, ("save:", "got rank 1:", "__1_0.distcp", "No space left on device", "newest checkpoint")
    )
    assert read_tracker(tmp_path) == 2


@pytest.mark.usefixtures("_may_mount")
def test_a_folder_that_becomes_read_only_ends_a_run_in_one_sentence(tmp_path: Path) -> None:
    result = run_program(FAILING_DISKS, 1, *FLAGS, "--no-async-save", "--save", str(tmp_path), FAULT="read-only")
    assert result.returncode == 2, result.stderr[-3000:]
    assert_errors(result.stderr, ("save:", "Read-only file system", "the same command continues"))
    assert read_tracker(tmp_path) == 2


@pytest.mark.usefixtures("_may_mount")
def test_a_folder_that_is_deleted_gets_the_next_checkpoints(tmp_path: Path) -> None:
    save = tmp_path / "run"
    # At once, so that the folder is not deleted under a write, which ends the run in one sentence.
    result = run_program(FAILING_DISKS, 1, *FLAGS, "--no-async-save", "--save", str(save), FAULT="deleted")
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_tracker(save) == 5
    assert "metrics.jsonl: was deleted" in result.stdout


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("fault", ["logs", "terminal"])
def test_what_is_only_printed_or_logged_ends_no_run(tmp_path: Path, fault: str) -> None:
    logs, flags = tmp_path / "logs", ("--verbose",) if fault == "terminal" else ()
    logs.mkdir()
    flags = (*FLAGS, *flags, "--save", str(tmp_path), "--metrics-path", str(logs / "metrics.jsonl"))
    result = run_program(FAILING_DISKS, 1, *flags, "--tensorboard-dir", str(logs), FAULT=fault)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("Traceback") == 0, result.stderr[-3000:]
    assert read_tracker(tmp_path) == 5
