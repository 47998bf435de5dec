"""Start the runs of gpu.py, each in processes of its own, and say in one line why one failed."""

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
        process.communicate()
        return Ended(stdout="", reason=f"stopped after {timeout_s:.0f} s: it did not end in its time")
    reason = None if process.returncode == 0 else find_reason(f"{stdout}\n{stderr}", process.returncode)
    return Ended(stdout=stdout, reason=reason)


def find_reason(output: str, exit_code: int) -> str:
    for pattern in REASONS:
        found = pattern.findall(output)
        if found:
            return found[-1].strip()[:MAX_REASON_LENGTH]
    return f"exit code {exit_code}"
