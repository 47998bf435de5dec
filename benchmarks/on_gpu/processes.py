"""Start the runs of gpu.py, each in processes of its own, and say in one line why one failed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ("-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", "1", "--")
MAX_REASON_LENGTH = 300
KILL_TIMEOUT_S = 10.0  # how long a killed process may keep us waiting
# What a failed run says of its cause, from the plainest on. The last line of the kind counts: a traceback ends with it.
REASONS = (
    re.compile(r"(?:OutOfMemoryError|CUDA out of memory).*"),
    re.compile(r"^(?:error|ERROR): .*", re.MULTILINE),
    re.compile(r"\w*(?:Error|Exception): .*"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a process ended. reason: None where it succeeded."""

    stdout: str
    reason: str | None


def adjust_megatron(platform: str, flags: Sequence[str]) -> None:
    """Adjust megatron as a run with `flags` will, before anything imports megatron.

    They depend on the backend too: with those of the torch backend, te would run our kernels and not its own.
    """
    from megatron_hammer.config.own_flags import read_option
    from megatron_hammer.platforms import megatron_compat

    megatron_compat.install(platform, read_option(flags, "--backend") or "torch")


def run_python(arguments: Sequence[str], *, timeout_s: float, variables: Mapping[str, str] | None = None) -> Ended:
    """Run this interpreter with our package on its path; its whole session ends with it or with its time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(variables or {})}
    # Set by a process of the cpu platform, such as a test's; a run on a GPU compiles.
    environment.pop("TORCH_COMPILE_DISABLE", None)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=max(timeout_s, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        # What it started may keep its pipes open, such as a process that the GPU driver does not let go.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILL_TIMEOUT_S)
        return Ended(stdout="", reason=f"stopped after {timeout_s:.0f} s: it did not end in its time")
    reason = None if process.returncode == 0 else find_reason(f"{stdout}\n{stderr}", process.returncode)
    return Ended(stdout=stdout, reason=reason)


def find_reason(output: str, exit_code: int) -> str:
    for pattern in REASONS:
        found = pattern.findall(output)
        if found:
            return found[-1].strip()[:MAX_REASON_LENGTH]
    return f"exit code {exit_code}"
