"""Why a training process ended, as a sentence with a remedy. Pure."""

import signal
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.errors import USER_ERROR_EXIT_CODE
from megatron_hammer.training.supervision.last_words import is_lost_connection

_LITTLE_SHM_BYTES = 4 << 20
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShrunkFile:
    path: Path
    before_bytes: int
    now_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known beside the exit code. note: the error that ended the rank, in one line.

    is_out_of_memory: whether the kernel has killed a process since the attempt began. memory_limit_bytes: of the
    cgroup that was full. shrunk_files: that the rank had mapped.
    """

    log_path: Path
    note: str | None = None
    is_out_of_memory: bool = False
    memory_limit_bytes: int | None = None
    shrunk_files: tuple[ShrunkFile, ...] = ()
    shm_free_bytes: int | None = None


def describe_exit(exit_code: int) -> str:
    """What a person reads after "rank 3 on host7 ". exit_code: as subprocess gives it, negative for a signal."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}"


def explain_exit(exit_code: int, evidence: Evidence) -> str:
    """The likely cause and what to do, in one or two sentences; begins with a capital letter."""
    if exit_code == -signal.SIGKILL:
        return _explain_kill(evidence)
    if exit_code == -signal.SIGBUS:
        return _explain_bus_error(evidence)
    if -exit_code in _CRASHES:
        return f"It crashed in compiled code; the stacks of its threads are at the end of {evidence.log_path}."
    if exit_code == -signal.SIGTERM:
        return "Somebody else ended it: the launcher had sent nothing. Look for a scheduler or an administrator."
    return _explain_error(exit_code, evidence)


def _explain_kill(evidence: Evidence) -> str:
    if not evidence.is_out_of_memory:
        return (
            "The kernel has counted no process killed for want of memory, so another process sent the signal: "
            "look for a scheduler or an administrator."
        )
    limit = evidence.memory_limit_bytes
    where = "the host" if limit is None else f"its cgroup, which is limited to {limit / 2**30:.1f} GiB,"
    return (
        f"The kernel killed it because {where} had no memory left. Start fewer processes on a host, use fewer "
        "--num-workers, or raise the limit of the job or container."
    )


def _explain_bus_error(evidence: Evidence) -> str:
    if evidence.shrunk_files:
        files = ", ".join(
            f"{file.path} has {file.now_bytes:,} bytes and had {file.before_bytes:,}" for file in evidence.shrunk_files
        )
        return f"A file that it reads became shorter: {files}. Restore the file, and write data only under new names."
    if evidence.shm_free_bytes is not None and evidence.shm_free_bytes < _LITTLE_SHM_BYTES:
        return "/dev/shm is full. Give the container more (--shm-size, or an emptyDir of medium Memory)."
    return (
        "A file that it had mapped became shorter, or its disk failed. Check the data with "
        "tools/inspect_data.py --verify, and the kernel's log."
    )


def _explain_error(exit_code: int, evidence: Evidence) -> str:
    note = evidence.note
    if note is None:
        return f"Its last lines in {evidence.log_path} say why."
    if exit_code == USER_ERROR_EXIT_CODE:
        return note
    if is_lost_connection(note):
        return (
            "It lost the connection to another rank, so the cause is there: see the rank or host that was reported "
            f"first, else the network between the hosts. It said: {note}"
        )
    if "OutOfMemoryError" in note or "out of memory" in note:
        return f"Its GPU had no memory left. Use a smaller --micro-batch-size or more ranks. It said: {note}"
    return f"{note.removesuffix('.')}. Its stack is in {evidence.log_path}."
