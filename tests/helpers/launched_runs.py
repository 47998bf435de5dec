"""Training runs under real launchers, whose processes start quickly (see launcher_server.py), for tests of failures."""

import contextlib
import functools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.repository import ROOT
from tests.helpers.training_runs import environment, read_lines

TIMEOUT_S = 120


class LaunchedRun:
    """A launcher that runs. pid: its process; log: what it and its ranks have printed.

    before_rank: a script that each rank runs first. namespaces_of: a process whose network and host name it has, see
    hosts.py. variables: more of its environment.
    """

    def __init__(
        self, *arguments: str, before_rank: str | None = None, namespaces_of: int | None = None, **variables: str
    ):
        self._folder = Path(tempfile.mkdtemp())
        self.log_path, self._code_path = self._folder / "log", self._folder / "code"
        request = {
            "arguments": arguments,
            "environment": environment() | variables,
            "log_path": str(self.log_path),
            "before_rank": before_rank,
            "namespaces_of": namespaces_of,
            "code_path": str(self._code_path),
        }
        server = _start_server()
        assert server.stdin
        assert server.stdout
        print(json.dumps(request), file=server.stdin, flush=True)
        self.pid = int(server.stdout.readline())

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def has_ended(self) -> bool:
        return self._code_path.exists()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code, negative for a signal; the processes of a run that takes too long are killed."""
        try:
            wait_until(self._code_path.exists, timeout_s, self)
        except AssertionError:
            self.kill()
            raise
        return int(self._code_path.read_text())

    def list_ranks(self) -> list[psutil.Process]:
        """The training processes of this launcher, by rank."""
        return sorted(psutil.Process(self.pid).children(), key=lambda process: process.pid)

    def kill(self) -> None:
        processes = [psutil.Process(self.pid)] if psutil.pid_exists(self.pid) else []
        for process in [*processes, *[child for parent in processes for child in parent.children(recursive=True)]]:
            process.kill()


def wait_until(is_true: Callable[[], bool], timeout_s: float = TIMEOUT_S, run: LaunchedRun | None = None) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s\n{run.log[-4000:] if run else ''}"
        time.sleep(0.02)


def wait_for_step(run: LaunchedRun, save_dir: Path, step: int) -> None:
    """Until metrics.jsonl has the step; fails if the run ends before."""

    def has_step() -> bool:
        assert not run._code_path.exists(), run.log[-4000:]
        path = save_dir / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= step

    wait_until(has_step, run=run)


def find_free_port() -> int:
    """Below 32768, where Linux begins to give out ports itself."""
    while True:
        port = random.randint(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def read_events(save_dir: Path, *names: str) -> list[dict[str, Any]]:
    """events.jsonl, or only its events of these names."""
    return [line for line in read_lines(save_dir / "events.jsonl") if not names or line["event"] in names]


@functools.cache
def _start_server() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "helpers" / "launcher_server.py")],
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
