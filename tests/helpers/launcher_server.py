"""Launchers of training runs that start quickly: forked, as are their ranks, from this process, which has the imports.

    python tests/helpers/launcher_server.py        (started and asked by tests/helpers/launched_runs.py)

Everything else of a launcher and its ranks is as for a user: processes with their own environment, session, standard
streams, signals and exit codes, torchrun's agent and its rendezvous. Only Popen is replaced, by fork.

One request a line on stdin, {"arguments", "environment", "log_path", "code_path", "before_rank", "namespaces_of"} (a
script that each rank runs first, or null; a process whose network and host name the launcher has, or null); one answer
a line on stdout, the process id of the launcher. Its exit code is written to code_path when it ends. The end of stdin
ends this process.
"""

import json
import os
import runpy
import signal
import sys
from typing import Any

from tests.helpers.rank_server import import_what_runs_import


class ForkedProcess:
    """What torch's SubprocessHandler uses of subprocess.Popen, for a Python module that runs in a fork."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], before: str | None):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as Popen does: the port of the rendezvous, among others
            # As exec does: the launcher's handlers are not the rank's.
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Nor are its streams, which lie under other descriptors.
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            run_and_exit(arguments, environment, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        import subprocess
        import time

        deadline_s = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(0.02)
        return self.returncode or 0


def run_and_exit(arguments: tuple[str, ...], environment: dict[str, str], before: str | None = None) -> None:
    """Run `python [-u] -m MODULE ARGUMENT...` in this process, and end it with the exit code Python would have."""
    os.environ.clear()
    os.environ.update(environment)
    module_at = arguments.index("-m") + 1
    sys.argv = [arguments[module_at], *arguments[module_at + 1 :]]
    code: Any = 0
    if before is not None:
        runpy.run_path(before)
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def serve() -> None:
    while line := sys.stdin.readline():
        request = json.loads(line)
        reader, writer = os.pipe()
        if os.fork() == 0:
            launch(request, writer)
        os.close(writer)
        with os.fdopen(reader) as answers:
            print(answers.readline().strip(), flush=True)


def launch(request: dict[str, Any], pid_writer: int) -> None:
    """In a process between the server and the launcher: wait for the launcher, and keep its exit code."""
    launcher = os.fork()
    if launcher == 0:
        os.setsid()
        for descriptor, path, mode in (
            (0, os.devnull, os.O_RDONLY),
            (1, request["log_path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
            (2, request["log_path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        ):
            os.dup2(os.open(path, mode, 0o644), descriptor)
        if request["namespaces_of"] is not None:
            os.setns(os.pidfd_open(request["namespaces_of"]), os.CLONE_NEWNET | os.CLONE_NEWUTS)
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        before_rank = request["before_rank"]
        subprocess_handler.SubprocessHandler._popen = lambda self, arguments, environment: ForkedProcess(
            arguments, environment, before_rank
        )
        os.environ.update(request["environment"])
        arguments = ("-m", "megatron_hammer.training.launch", *request["arguments"])
        run_and_exit(arguments, dict(os.environ))
    os.write(pid_writer, f"{launcher}\n".encode())
    os.close(pid_writer)
    code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    partial = f"{request['code_path']}.partial"
    with open(partial, "w") as file:
        file.write(str(code))
    os.rename(partial, request["code_path"])
    os._exit(0)


if __name__ == "__main__":
    import_what_runs_import()
    import torch.distributed.run  # noqa: F401

    import megatron_hammer.training.launch
    import megatron_hammer.training.supervision.launcher.agent  # noqa: F401

    serve()
