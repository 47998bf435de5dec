"""Runs one command line of a checkout: for compare_revisions.py.

Importing torch and transformers costs a command 2 to 5 s, most of what it takes. Commands that need them and build
nothing beforehand are therefore forked from a process that has imported both, and nothing of the package; all others,
trainings among them, are started as users start them. That every tool starts by itself is for tests/ to show.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PRELOADED = ["torch.distributed.checkpoint", "transformers.models.llama.modeling_llama", "safetensors.torch", "gguf"]
FORKED = re.compile(
    r"checkpoint_convert/|tools/(build_data_cache|build_rank|generate_sample|resize_embeddings)\.py|"
    r"-m megatron_hammer\.training\.pretrain .*--dry-run"
)
TIMEOUT_S = 600


class Finished(NamedTuple):
    """What a command that has ended leaves."""

    exit_code: int
    stdout: str
    stderr: str


def run_command(command: str, *, checkout: Path, folder: Path, environment: Mapping[str, str]) -> Finished:
    """Run a command line in the folder, to its end. Raises SystemExit if it takes too long."""
    words = shlex.split(command)
    environment = dict(environment)
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[0] != "-m":
        words[0] = str(checkout / words[0])
    with tempfile.TemporaryDirectory() as streams_dir:
        paths = [Path(streams_dir, name) for name in ("stdout", "stderr")]
        if FORKED.match(command):
            code = run_forked(words, paths, checkout, folder)
        else:
            program = "bash" if words[0].endswith(".sh") else sys.executable
            code = run_started([program, *words], paths, folder, environment)
        if code is None:
            sys.exit(f"error: {command}: must end within {TIMEOUT_S} s, got a timeout. Run it by hand.")
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return Finished(code, stdout, stderr)


def run_started(words: Sequence[str], paths: Sequence[Path], folder: Path, variables: Mapping[str, str]) -> int | None:
    """Exit code of a program in a session of its own; None: it took too long, and was killed."""
    with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
        process = subprocess.Popen(
            words, cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def run_forked(words: Sequence[str], paths: Sequence[Path], checkout: Path, folder: Path) -> int | None:
    """The same of a Python program, in a fork of the process that has imported what is slow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_here, args=(list(words), list(paths), checkout, folder))
    process.start()
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def _run_here(words: list[str], paths: list[Path], checkout: Path, folder: Path) -> None:
    """Become the program: streams, folder, search path and arguments are those that it would find when started."""
    os.setsid()
    os.chdir(folder)
    for descriptor, path in enumerate(paths, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)
    own_dir = str(Path(__file__).parent)
    installed = [entry for entry in sys.path if entry not in (own_dir, str(checkout), "")]
    if words[0] == "-m":
        sys.path[:] = [str(folder), str(checkout), *installed]
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(words[0]).parent), str(checkout), *installed]
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
