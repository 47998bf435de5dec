"""A rank that ends is named with its host, the cause and a remedy, in place of a signal's number or torch's stacks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launched_runs import LaunchedRun, find_free_port, read_events, wait_for_step
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, environment, write_toy_data

pytestmark = pytest.mark.distributed
ENDLESS = (*TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "5000", "--split", "100,0,0", "--save-interval", "5000")
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")


def test_data_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    data = Path(f"{write_toy_data(tmp_path / 'data', num_documents=5000)}.bin")
    size = data.stat().st_size
    run = LaunchedRun(*TWO_RANKS, "--", *ENDLESS, "--data-path", str(tmp_path / "data"), "--save", str(tmp_path))
    wait_for_step(run, tmp_path, 3)
    os.truncate(data, 4096)
    assert run.wait() == 128 + signal.SIGBUS
    (event,) = read_events(tmp_path, "rank-failed")
    assert event["exit_code"] == -signal.SIGBUS
    (error,) = [line for line in run.log.splitlines() if line.startswith("error:")]
    assert error == f"error: {event['message']}"
    assert f"rank {event['rank']} on {event['host']} was killed by SIGBUS after step {event['step']}" in error
    assert f"{data} has 4,096 bytes and had {size:,}" in error
    assert "Traceback" not in run.log


def test_a_crash_leaves_the_stacks_in_the_log_of_the_rank(tmp_path: Path) -> None:
    run = LaunchedRun(*TWO_RANKS, "--", *ENDLESS, "--mock-data", "--save", str(tmp_path))
    wait_for_step(run, tmp_path, 2)
    run.list_ranks()[1].send_signal(signal.SIGSEGV)
    assert run.wait() == 128 + signal.SIGSEGV
    log_path = tmp_path / "logs" / "rank-1.log"
    assert f"the stacks of its threads are at the end of {log_path}" in run.log
    assert "Traceback" not in run.log, "the other rank has lost its connection, which says nothing"
    log = log_path.read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert " in train\n" in log, "the loop, wherever the signal met it"


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    nodes = ("--nnodes", "3", "--nproc-per-node", "1", "--master-addr", "localhost", "--master-port")
    port, save = str(find_free_port()), ("--", "--save", str(tmp_path))
    runs = [
        # Node 0's launcher holds the list of those that are there, so it waits longer.
        LaunchedRun(*nodes, port, "--node-rank", str(rank), "--rdzv-conf", f"join_timeout={wait_s}", *save)
        for rank, wait_s in ((0, 8), (1, 2))
    ]
    assert [run.wait() for run in runs] == [1, 1]
    for run, wait_s in zip(runs, (8, 2), strict=True):
        (error,) = [line for line in run.log.splitlines() if line.startswith("error:")]
        assert "nodes: all 3 must be there, got" in error
        assert f"within {wait_s} s: missing node" in error
        assert error.split("missing node ")[1].split(".")[0].endswith("2")
        assert "Traceback" not in run.log


def test_a_mistake_on_one_host_ends_the_others_with_its_sentence(tmp_path: Path) -> None:
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "9", "--master-addr", "localhost")
    port = str(find_free_port())
    runs = [
        LaunchedRun(*nodes, "--master-port", port, "--node-rank", rank, "--", *ENDLESS, "--mock-data", *flags)
        for rank, flags in (("0", ("--lr", "-1", "--save", str(tmp_path))), ("1", ("--save", str(tmp_path))))
    ]
    assert [run.wait() for run in runs] == [2, 2]
    (error,) = [line for line in runs[1].log.splitlines() if line.startswith("error:")]
    assert "rank 0 on " in error
    assert "lr: must be" in error
    assert "restart" not in runs[1].log
    assert "Traceback" not in runs[0].log + runs[1].log


def test_a_launcher_that_node_0_does_not_answer_says_so(tmp_path: Path) -> None:
    place = ("--nnodes", "2", "--node-rank", "1", "--rdzv-conf", "join_timeout=1,read_timeout=1")
    port = find_free_port()
    run = LaunchedRun(*place, "--master-addr", "localhost", "--master-port", str(port), "--", "--save", str(tmp_path))
    assert run.wait() == 1
    assert f"nodes: the launcher of node 0 must answer at localhost:{port}, got no connection." in run.log
    assert "Traceback" not in run.log


HUNGRY = """
import os, time
if os.environ["RANK"] == "1":
    blocks = [bytearray(os.urandom(1 << 20) * 16) for _ in range(200)]
time.sleep(60)
"""
DRIVER = "import sys; from megatron_hammer.training import launch; launch.TRAINING_MODULE = 'fake'; launch.main()"


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """The file of a new memory cgroup, of 1 GiB, to which processes are written."""
    version_1, version_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, name = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_2, "memory.max")
    folder = parent / f"hammer-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(1 << 30))
    except OSError as error:
        pytest.skip(f"needs the right to make a memory cgroup, as root has it on a host: {error}")
    yield folder / "cgroup.procs"
    folder.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_one_that_somebody_kills(
    tmp_path: Path, memory_cgroup: Path
) -> None:
    (tmp_path / "fake.py").write_text(HUNGRY)
    result = subprocess.run(
        ["sh", "-c", f'echo $$ > {memory_cgroup} && exec "$@"', "sh", sys.executable, "-c", DRIVER, *TWO_RANKS, "--"],
        env={**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 128 + signal.SIGKILL, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "rank 1 on " in error
    assert "The kernel killed it because its cgroup, which is limited to 1.0 GiB, had no memory left." in error


def test_a_worker_of_the_data_loader_that_is_killed_is_named(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data", num_documents=5000)
    flags = (*ENDLESS, "--data-path", data, "--save", str(tmp_path), "--num-workers", "1")
    run = LaunchedRun("--standalone", "--nproc-per-node", "1", "--", *flags)
    wait_for_step(run, tmp_path, 3)
    (worker,) = run.list_ranks()[0].children()
    worker.kill()
    assert run.wait() == 1, run.log
    assert f"num-workers: processes that load data must live as long as the run, got process {worker.pid}" in run.log
    assert "Traceback" not in run.log
    assert "Traceback" in (tmp_path / "logs" / "rank-0.log").read_text()


# torch's workers share a lock with their rank, which takes it on its way out.
HOLDS_A_LOCK = """
import multiprocessing.synchronize, os, signal
import torch.utils.data
from megatron_hammer.training.supervision import ending

def is_set(event, calls=[], original=multiprocessing.synchronize.Event.is_set):
    if torch.utils.data.get_worker_info() is not None:
        calls.append(event)
        if len(calls) == 6:
            event._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
    return original(event)

multiprocessing.synchronize.Event.is_set = is_set
ending.END_WITHIN_S = 1.0
"""


def test_a_worker_that_is_killed_with_a_lock_does_not_keep_its_rank_from_ending(tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(HOLDS_A_LOCK)
    flags = (*ENDLESS, "--mock-data", "--save", str(tmp_path), "--num-workers", "1")
    run = LaunchedRun("--standalone", "--nproc-per-node", "1", "--", *flags, before_rank=str(tmp_path / "before.py"))
    assert run.wait() == 1, run.log
    assert "num-workers: processes that load data must live as long as the run, got process" in run.log
    assert "in _shutdown_workers" in (tmp_path / "logs" / "rank-0.log").read_text(), "where it waited"
