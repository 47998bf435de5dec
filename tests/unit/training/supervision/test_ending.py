import subprocess
import sys
import threading
import time

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.training.supervision import ending
from megatron_hammer.training.supervision.ending import finish_together

PROGRAM = """
import atexit, multiprocessing, sys, threading, time
from megatron_hammer.errors import ConfigError
from megatron_hammer.training.supervision import ending
ending.END_WITHIN_S = 0.2
ending.skip_teardown()
lock = multiprocessing.Lock()
lock.acquire()
def wait_in_thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
def wait_in_exit():
    atexit.register(lock.acquire)
class Waits:
    def __del__(self):
        lock.acquire()
def wait_at_the_very_end():
    sys.keeps = Waits()
with ending.ends_soon():
    globals()[sys.argv[1]]()
    exec(sys.argv[2])
"""


@pytest.mark.parametrize("wait", ["wait_in_thread", "wait_in_exit", "wait_at_the_very_end"])
@pytest.mark.parametrize(("way_out", "exit_code"), [("pass", 0), ("sys.exit(143)", 143), ("raise ConfigError", 2)])
def test_what_waits_on_its_way_out_ends_with_the_code_of_that_way(wait: str, way_out: str, exit_code: int) -> None:
    command = [sys.executable, "-c", PROGRAM, wait, way_out]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == exit_code, result.stderr
    assert "most recent call first" in result.stdout or wait == "wait_at_the_very_end", "where it waited"


def test_ranks_wait_for_the_one_that_takes_longest() -> None:
    barrier, values, ended = threading.Barrier(2), [0.0, 0.0], []

    def run(rank: int) -> None:
        def max_over_ranks(value: float) -> float:
            values[rank] = value
            barrier.wait()
            largest = max(values)
            barrier.wait()
            return largest

        seconds = 0.5 * rank
        finish_together(
            lambda: time.sleep(seconds), max_over_ranks=max_over_ranks, on_wait=lambda: None, say=lambda text: None
        )
        ended.append(time.monotonic())

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert abs(ended[0] - ended[1]) < 0.4


def finish_alone(finish, said: list[str]) -> None:
    finish_together(finish, max_over_ranks=lambda value: value, on_wait=lambda: None, say=said.append)


def test_what_does_not_end_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "FINISH_WITHIN_S", 0.1)
    said: list[str] = []
    finish_alone(lambda: time.sleep(60), said)
    assert "took longer than" in said[0]


def test_an_error_at_the_end_is_raised() -> None:
    def fail() -> None:
        raise ConfigError("save: no.")

    with pytest.raises(ConfigError, match="save: no"):
        finish_alone(fail, [])
