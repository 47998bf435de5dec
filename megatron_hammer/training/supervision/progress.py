"""How far each rank of this host is, for its launcher: a small record per rank in memory that both see.

A record costs a rank less than a microsecond, needs no thread in it, and stays readable when the rank is killed or
hangs. The launcher makes the folder and passes it on as HAMMER_PROGRESS_DIR; without it nothing is recorded.
"""

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

PROGRESS_VARIABLE: Final = "HAMMER_PROGRESS_DIR"
ATTEMPT_VARIABLE: Final = "HAMMER_ATTEMPT"  # number of this start of the ranks, from 0
STACKS_SIGNAL: Final = signal.SIGUSR2  # asks a rank for the stacks of its threads, which it writes to its log
Phase = Literal[
    "starting", "building the model", "building the data", "loading", "training", "evaluating", "saving", "ending"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
_RECORD = struct.Struct("<qqdBB6x")  # step, collectives, time, phase, is_waiting


@dataclass(frozen=True, kw_only=True, slots=True)
class RankProgress:
    """step: last finished by this process, 0 before. num_waits: collectives waited for. is_waiting: in one now.

    changed_at_s: on time.monotonic's clock, which all processes of a host share and no change of the date moves.
    """

    step: int
    num_waits: int
    changed_at_s: float
    phase: Phase
    is_waiting: bool


class ProgressRecord:
    """What a rank writes. path: of its record; None records nothing."""

    def __init__(self, path: Path | None):
        if path is None:
            self._memory: mmap.mmap | bytearray = bytearray(_RECORD.size)
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            os.truncate(descriptor, _RECORD.size)
            self._memory = mmap.mmap(descriptor, _RECORD.size)
            os.close(descriptor)
        self._step = self._num_waits = 0
        self._phase = 0
        self._write(is_waiting=False)

    def finish_step(self, step: int) -> None:
        self._step = step
        self._write(is_waiting=False)

    def enter(self, phase: Phase) -> Phase:
        """Begin a phase; returns the one before, to return to it."""
        previous = PHASES[self._phase]
        self._phase = PHASES.index(phase)
        self._write(is_waiting=False)
        return previous

    def begin_wait(self) -> None:
        """A collective is waited for."""
        self._num_waits += 1
        self._write(is_waiting=True)

    def end_wait(self) -> None:
        self._write(is_waiting=False)

    def _write(self, *, is_waiting: bool) -> None:
        _RECORD.pack_into(self._memory, 0, self._step, self._num_waits, time.monotonic(), self._phase, is_waiting)


def open_record() -> ProgressRecord:
    """The record of this process, in the folder of its launcher."""
    directory = os.environ.get(PROGRESS_VARIABLE)
    return ProgressRecord(None if directory is None else find_record(Path(directory), int(os.environ["LOCAL_RANK"])))


def find_record(directory: Path, local_rank: int) -> Path:
    return directory / f"rank-{local_rank}"


def read_record(path: Path) -> RankProgress | None:
    """None where the rank has not begun its record."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) != _RECORD.size:
        return None
    step, num_waits, changed_at_s, phase, is_waiting = _RECORD.unpack(content)
    if changed_at_s == 0.0:
        return None
    return RankProgress(
        step=step,
        num_waits=num_waits,
        changed_at_s=changed_at_s,
        phase=PHASES[min(phase, len(PHASES) - 1)],
        is_waiting=bool(is_waiting),
    )
