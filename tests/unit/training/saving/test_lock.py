"""The lock on --save between processes of this host, and of hosts that are pretended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.training.saving import lock
from megatron_hammer.training.saving.lock import LOCK_FILE, Holder, RunLock, describe_this_process, read_holder
from tests.helpers.repository import ROOT

HOLD = "import sys, time; from pathlib import Path; from megatron_hammer.training.saving.lock import RunLock; "
HOLD += "held = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SIGN_INTERVAL_S", 0.05), ("SILENCE_S", 0.4), ("RELEASE_S", 0.3)):
        monkeypatch.setattr(lock, name, seconds)
    for name in lock.JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def other_process(save: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(save)], env=environment, stdout=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def write_lock(save: Path, **changes: object) -> Holder:
    holder = dataclasses.replace(describe_this_process(), **changes)  # type: ignore[arg-type]
    (save / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_run_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"save: must be written by one run.*process {os.getpid()} on host"):
        RunLock(tmp_path / "run")
    first.release()
    assert read_holder(tmp_path / "run" / LOCK_FILE) is None
    RunLock(tmp_path / "run").release()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    with other_process(tmp_path) as other:
        with pytest.raises(ConfigError, match=f"process {other.pid} on host"):
            RunLock(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert read_holder(tmp_path / LOCK_FILE) is not None  # what it left
        RunLock(tmp_path).release()


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"process_started": "1"}, {"process": 2**22 + 1}])
def test_what_a_reboot_or_an_old_process_left_is_no_lock(tmp_path: Path, changes: dict[str, object]) -> None:
    write_lock(tmp_path, **{"process": os.getppid(), **changes})
    started_at_s = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - started_at_s < lock.SILENCE_S


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_signs_decide_between_hosts_and_containers(tmp_path: Path, place: dict[str, object]) -> None:
    holder = write_lock(tmp_path, **place)
    is_over = threading.Event()

    def give_signs() -> None:
        while not is_over.wait(0.05):
            os.utime(tmp_path / LOCK_FILE)

    signs = threading.Thread(target=give_signs)
    signs.start()
    with pytest.raises(ConfigError, match=f"on host {holder.host}"):
        RunLock(tmp_path)
    is_over.set()
    signs.join()
    RunLock(tmp_path).release()


def test_a_lost_host_does_not_keep_its_kernel_lock_against_all(tmp_path: Path) -> None:
    """As NFS does for the minutes of its lease."""
    with other_process(tmp_path) as other:
        other.send_signal(signal.SIGSTOP)  # it gives no signs, and holds
        write_lock(tmp_path, host="lost")
        RunLock(tmp_path).release()


def test_a_run_sees_that_another_took_over(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    assert not held.is_lost
    taken = write_lock(tmp_path, host="elsewhere")
    assert held.is_lost
    held.release()
    assert read_holder(tmp_path / LOCK_FILE) == taken


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_half_a_lock_file_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    RunLock(tmp_path).release()
