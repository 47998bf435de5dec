"""A run that stands still: who holds it up is said long before the collectives time out, and may end the attempt."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.launched_runs import LaunchedRun, find_free_port, read_events, wait_for_step, wait_until
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_tracker

pytestmark = pytest.mark.distributed
ENDLESS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "5000", "--mock-data", "--save-interval", "5000")


def has_hang(save_dir: Path) -> bool:
    return (save_dir / "events.jsonl").exists() and bool(read_events(save_dir, "hang"))


def test_a_stopped_rank_of_another_host_is_named_and_may_be_replaced(tmp_path: Path) -> None:
    """Two launchers are two hosts here."""
    port = str(find_free_port())

    def launch(node: int) -> LaunchedRun:
        place = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost", "--master-port", port)
        options = ("--nproc-per-node", "1", "--max-restarts", "1", "--end-hangs")
        return LaunchedRun(*place, *options, "--", *ENDLESS, "--save", str(tmp_path))

    first, second = launch(0), launch(1)
    wait_for_step(first, tmp_path, 3)
    (stopped,) = second.list_ranks()
    stopped.send_signal(signal.SIGSTOP)
    wait_until(lambda: len(read_events(tmp_path, "attempt-started")) == 4, run=first)
    (hang,) = read_events(tmp_path, "hang")
    assert hang["ranks"] == [1]
    assert hang["message"].startswith(f"rank 1 on {hang['host']} (process {stopped.pid}, after step ")
    assert "is stopped, as by SIGSTOP" in hang["message"]
    assert f"kill -CONT {stopped.pid}" in hang["message"]
    assert f"warning: {hang['message']}." in first.log
    failed = read_events(tmp_path, "rank-failed")
    assert all(hang["message"] in event["message"] for event in failed), "the reason, and not SIGKILL"
    # It waits in its step, or where ranks ask each other for signals after it.
    assert " in train\n" in (tmp_path / "logs" / "rank-0.log").read_text(), "the stacks of all ranks"
    for run in (first, second):
        run.kill()


STUCK = """
import sys, time
from megatron_hammer.training import forward_step

original = forward_step.ForwardStep.__call__

def stuck(self, *arguments):
    import os
    stuck.calls = getattr(stuck, "calls", 0) + 1
    while os.environ["RANK"] == "1" and stuck.calls > 20:
        time.sleep(0.1)
    return original(self, *arguments)

forward_step.ForwardStep.__call__ = stuck
"""


def test_a_rank_that_waits_for_nobody_is_named(tmp_path: Path) -> None:
    """As in a loop of its own code, where the kernel sees nothing wrong."""
    (tmp_path / "stuck.py").write_text(STUCK)
    two_ranks = ("--standalone", "--nproc-per-node", "2", "--hang-timeout", "3")
    flags = (*ENDLESS, "--tensor-model-parallel-size", "2", "--save", str(tmp_path))
    run = LaunchedRun(*two_ranks, "--", *flags, before_rank=str(tmp_path / "stuck.py"))
    wait_until(lambda: has_hang(tmp_path), run=run)
    (hang,) = read_events(tmp_path, "hang")
    assert (hang["ranks"], hang["phases"]) == ([1], ["training"])
    assert "nothing has moved for " in hang["message"]
    assert f"rank 1 on {hang['host']}" in hang["message"]
    log_path = tmp_path / "logs" / "rank-1.log"
    wait_until(lambda: "in stuck" in log_path.read_text(), run=run)
    assert read_events(tmp_path, "rank-failed") == [], "without --end-hangs it is only said"
    run.kill()


@pytest.mark.long
def test_a_stopped_launcher_of_node_0_is_waited_for(tmp_path: Path) -> None:
    """The other node ends its ranks after 30 s of silence, and the run continues when the launcher does."""
    port = str(find_free_port())

    def launch(node: int) -> LaunchedRun:
        place = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost", "--master-port", port)
        schedule = ("--train-iters", "1500", "--save-interval", "100")
        options = ("--nproc-per-node", "1", "--max-restarts", "2")
        return LaunchedRun(*place, *options, "--", *ENDLESS, *schedule, "--save", str(tmp_path))

    first, second = launch(0), launch(1)
    wait_for_step(first, tmp_path, 3)
    os.kill(first.pid, signal.SIGSTOP)
    wait_until(lambda: bool(read_events(tmp_path, "node-lost")), run=second)
    os.kill(first.pid, signal.SIGCONT)
    assert (first.wait(300), second.wait(300)) == (0, 0), first.log + second.log
    assert read_tracker(tmp_path) == 1500
