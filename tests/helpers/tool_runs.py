"""Run tools and examples as a user types them: in a process of their own, or in this one, which has torch already."""

import contextlib
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.helpers.repository import ROOT

TIMEOUT_S = 240


class Finished(NamedTuple):
    """What a tool that has ended leaves: (exit code, standard output, standard error)."""

    returncode: int
    stdout: str
    stderr: str


def start_tool(
    tool: str | Path, *arguments: str | Path, cwd: Path | None = None, max_file_bytes: int | None = None, **more: str
) -> subprocess.Popen[str]:
    """Start tool, a path in the repository, in a session of its own; `more` goes into its environment.

    max_file_bytes: writing more to one file fails, as on a full disk.
    """

    def prepare() -> None:
        # whoever runs the tests in the background may have them ignore Ctrl-C, which children inherit
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return subprocess.Popen(
        [sys.executable, str(ROOT / tool), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def run_tool(
    tool: str | Path,
    *arguments: str | Path,
    cwd: Path | None = None,
    max_file_bytes: int | None = None,
    timeout_s: float = TIMEOUT_S,
    **more: str,
) -> Finished:
    """Run a tool to its end in a process of its own."""
    process = start_tool(tool, *arguments, cwd=cwd, max_file_bytes=max_file_bytes, **more)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Finished(process.returncode, stdout, stderr)


def run_example(name: str, *flags: str | Path, timeout_s: float = 300, **variables: str | Path) -> Finished:
    """Run a script of examples/ to its end on the CPU, with these variables in its environment."""
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / name), *map(str, flags)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **{key: str(value) for key, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def without_notes(stderr: str) -> str:
    """The errors only: whether the toy tokenizer suits the fast encoder is not tested there."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("note: "))


def run_tool_here(tool: str | Path, *arguments: str | Path, cwd: Path | None = None) -> Finished:
    """Run a tool in this process, where it need not import torch again; each tool is started for real elsewhere too."""
    return run_python_here(str(ROOT / tool), *map(str, arguments), cwd=cwd)


def run_python_here(*words: str, cwd: Path | None = None) -> Finished:
    """What `python WORD...` does, in this process. words: `-m` and a module, or a script, and then the arguments."""
    module, arguments = (words[1], words[1:]) if words[0] == "-m" else (None, words)
    folders = [] if module else [str((cwd or Path.cwd()) / Path(arguments[0]).parent)]
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [*arguments]),
        # A script's own folder is where it first looks for what it imports.
        mock.patch.object(sys, "path", [*folders, *sys.path]),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            if module is None:
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Finished(code, stdout.getvalue(), stderr.getvalue())
