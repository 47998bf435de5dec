import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hammer.errors import ConfigError
from megatron_hammer.training.supervision.last_words import (
    explain_group_error,
    explain_lost_worker,
    is_lost_connection,
    note_user_errors,
    read_note,
    write_note,
)

PROGRAM = """
import sys
from megatron_hammer.training.supervision.last_words import leave_last_words
leave_last_words()
raise RuntimeError(sys.argv[1])
"""


WORKER_IS_LOST = """
import os, signal, torch
worker = os.fork()
if worker == 0:
    signal.pause()
torch._C._set_worker_pids(0, (worker,))
os.kill(worker, signal.SIGKILL)
"""


def end_with(error: str, directory: Path | None, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "LOCAL_RANK": "2"}
    if directory is not None:
        environment["HAMMER_PROGRESS_DIR"] = str(directory)
    command = [sys.executable, "-c", program, error]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_error_keeps_its_stack_and_is_noted(tmp_path: Path) -> None:
    result = end_with("boom\nin two lines", tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert read_note(tmp_path, 2) == "RuntimeError: boom in two lines"


def test_the_stack_of_a_lost_connection_goes_to_the_log(tmp_path: Path) -> None:
    result = end_with("Connection closed by peer [::1]:7", tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert "Traceback" in result.stdout
    assert is_lost_connection(read_note(tmp_path, 2) or "")
    alone = end_with("Connection closed by peer [::1]:7", None)
    assert alone.stderr == "error: lost the connection to another rank: Connection closed by peer [::1]:7\n"


def test_a_lost_worker_is_named_whatever_error_shows_it_first(tmp_path: Path) -> None:
    result = end_with("[Errno 104] Connection reset by peer", tmp_path, WORKER_IS_LOST + PROGRAM)
    assert result.returncode == 1
    assert result.stderr.startswith("error: num-workers: processes that load data must live as long as the run")
    assert "killed by signal: Killed" in (read_note(tmp_path, 2) or "")


@pytest.mark.parametrize(
    "text",
    [
        "Application timeout caused pair closure",
        "[pair.cc:545] Read error [127.0.0.1]:62666: Connection reset by peer.",
        "NCCL communicator was aborted on rank 3.",
        "recvValue failed on SocketImpl(fd=61): Failed to recv, got 0 bytes.",
    ],
)
def test_what_torch_says_of_a_rank_that_is_gone(text: str) -> None:
    assert is_lost_connection(text)
    assert not is_lost_connection("ValueError: connection of the layers is wrong")


PLACE = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("The server socket has failed to listen. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE",
         ("MASTER_PORT: must be free", "got host0:29500")),
        ("The client socket has timed out after 600000ms while trying to connect to (host0, 29500).",
         ("MASTER_ADDR: rank 0 must answer at host0:29500", "got no connection")),
        ("Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
         ("WORLD_SIZE: all 2 ranks must come to host0:29500, got 1.",)),
    ],
)  # fmt: skip
def test_ranks_that_do_not_find_each_other_get_a_sentence(text: str, facts: tuple[str, ...]) -> None:
    sentence = explain_group_error(f"DistNetworkError: {text}", PLACE)
    assert sentence is not None
    assert [fact for fact in facts if fact not in sentence] == []


def test_a_port_in_use_is_recognised_as_torch_says_it() -> None:
    """And not only as it said when the sentence was written."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError) as refused:
            torch.distributed.TCPStore("localhost", port, is_master=True)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    assert f"must be free on the host of rank 0, got localhost:{port}" in str(
        explain_group_error(str(refused.value), place)
    )
    with pytest.raises(RuntimeError) as unanswered:
        torch.distributed.TCPStore("localhost", port, is_master=False, timeout=datetime.timedelta(seconds=1))
    assert "rank 0 must answer at" in str(explain_group_error(str(unanswered.value), place))
    with pytest.raises(RuntimeError) as alone:
        torch.distributed.TCPStore("localhost", 0, 2, is_master=True, timeout=datetime.timedelta(seconds=1))
    assert "all 2 ranks must come" in str(explain_group_error(str(alone.value), place))


def test_other_errors_have_no_such_sentence() -> None:
    assert explain_group_error("ValueError: 1/2 of the clients", PLACE) is None


def test_a_mistake_of_the_user_is_noted_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HAMMER_PROGRESS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")

    @note_user_errors
    def main() -> None:
        raise ConfigError("lr: must be positive.", "another")

    with pytest.raises(ConfigError):
        main()
    assert read_note(tmp_path, 0) == "lr: must be positive."
    assert read_note(tmp_path, 1) is None


def test_a_note_without_a_launcher_is_nowhere(monkeypatch) -> None:
    monkeypatch.delenv("HAMMER_PROGRESS_DIR", raising=False)
    write_note("text")
    assert "HAMMER_PROGRESS_DIR" not in os.environ


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "RuntimeError: DataLoader worker (pid 2641) is killed by signal: Killed. ",
            "2641, which is killed by signal: K",
        ),
        ("RuntimeError: DataLoader worker (pid(s) 12, 13) exited unexpectedly", "12, 13, which exited unexpectedly"),
    ],
)
def test_a_lost_worker_of_the_data_loader_is_recognised(text: str, named: str) -> None:
    assert named in str(explain_lost_worker(text))
    assert explain_lost_worker("RuntimeError: a worker") is None
