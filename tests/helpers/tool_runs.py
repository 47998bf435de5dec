"""Run the tools from tests as a user types them: in a process of their own, or in this one, which has torch already."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


class Finished(NamedTuple):
    """What a tool that has ended leaves: (exit code, standard output, standard error)."""

    returncode: int
    stdout: str
    stderr: str


def start_tool(tool: str | Path, *arguments: str | Path, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
    """Start tool, a path in the repository, in a session of its own; `more` goes into its environment."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / tool), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # whoever runs the tests in the background may have them ignore Ctrl-C, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_tool(tool: str | Path, *arguments: str | Path, cwd: Path | None = None, **more: str) -> Finished:
    """Run a tool to its end in a process of its own."""
    process = start_tool(tool, *arguments, cwd=cwd, **more)
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Finished(process.returncode, stdout, stderr)


def run_tool_here(tool: str | Path, *arguments: str | Path, cwd: Path | None = None) -> Finished:
    """Run a tool in this process, where it need not import torch again; each tool is started for real elsewhere too."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [str(REPOSITORY / tool), *map(str, arguments)]),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(str(REPOSITORY / tool), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Finished(code, stdout.getvalue(), stderr.getvalue())
