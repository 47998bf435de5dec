"""What stands in the way of a save, as one sentence on every rank, and before anything is written where possible."""

import os
import re
import socket
from pathlib import Path

from megatron_hammer.config.preflight.space import count_needed_bytes, find_space_problems
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.errors import ConfigError, OutputError
from megatron_hammer.platforms.agreement import ask_first_rank
from megatron_hammer.training.saving.lock import RunLock

_REMEDY = "Free space or repair the disk; the same command continues from the newest checkpoint that is complete."
# How megatron's writer hands on what its worker said; see FileSystemWriterAsync.retrieve_write_results.
_OF_WORKER = re.compile(r"Worker failure: (.*)", re.DOTALL)


def require_room(plan: RunPlan, lock: RunLock | None = None) -> None:
    """Raise OutputError on every rank if rank 0 cannot write in --save, or finds too little room there.

    lock: of rank 0; ConfigError if another run has taken it.

    Called by every rank before a save. A rank that failed later would leave the others in a collective.
    """
    ask_first_rank(lambda: _require_room_here(plan, lock))


def _require_room_here(plan: RunPlan, lock: RunLock | None) -> None:
    assert plan.checkpoints.save is not None
    if lock is not None and lock.is_lost:
        raise ConfigError(
            f"save: must be written by one run at a time, got {plan.checkpoints.save}, which another run took while "
            f"this host gave no sign in {lock.path.name}. Look for the other run; this one ends without another save."
        )
    save_dir = Path(plan.checkpoints.save)
    probe = save_dir / f".writable-{socket.gethostname()}-{os.getpid()}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise explain(error, plan) from error
    if problems := find_space_problems(plan.checkpoints.save, count_needed_bytes(plan, save_dir)):
        raise OutputError(*problems)


def explain(error: BaseException, plan: RunPlan) -> OutputError:
    """The sentence for an OSError, or for torch's CheckpointException, in which rank 0 has what each rank said."""
    if isinstance(error, OSError):
        what = f"{error.filename or plan.checkpoints.save}: {error.strerror or error}"
    else:
        failures = getattr(error, "failures", {})  # by rank: exception and stack; rank 0 alone has them
        causes = [f"rank {rank}: {_read_cause(failure[0])}" for rank, failure in sorted(failures.items())]
        what = "; ".join(causes) or "a failure that rank 0 names"
    sentence = OutputError(f"save: every part of a checkpoint must be written, got {what}. {_REMEDY}")
    sentence.is_told = not isinstance(error, OSError) and not getattr(error, "failures", {})
    return sentence


def _read_cause(error: BaseException) -> str:
    match = _OF_WORKER.search(str(error))
    return match[1] if match else f"{type(error).__name__}: {error}"
