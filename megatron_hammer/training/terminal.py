"""Keeps megatron's own output (hundreds of lines on every rank) off the terminal, in one file per rank.

Errors still reach the terminal, and the file too: it is the one place that has everything about a rank.
"""

import contextlib
import datetime
import faulthandler
import io
import logging
import os
import select
import socket
import sys
import warnings
from pathlib import Path
from typing import IO, Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.read import refuse_pipes
from megatron_hammer.training.supervision.log_folder import find_log, find_log_dir
from megatron_hammer.training.supervision.progress import ATTEMPT_VARIABLE, STACKS_SIGNAL

PATIENCE_S = 10.0
_CHUNK_CHARS = 1024  # a pipe that is ready takes at least a page, without waiting


class LogStream(io.TextIOWrapper):
    """A text file that loses what its disk has no room for, and lets the run go on. Nothing is buffered."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)


class TerminalStream(LogStream):
    """A terminal or pipe; loses what one that is gone, or does not read for `PATIENCE_S`, does not take.

    Ctrl-S stops a terminal, and a pager or a copy to a hanging disk stops a pipe: the run would wait for it.
    """

    _is_stalled = False

    def write(self, text: str) -> int:
        for start in range(0, len(text), _CHUNK_CHARS):
            was_stalled = self._is_stalled
            if not self._wait_for_room():
                break
            if was_stalled:
                super().write("\nwarning: nothing was read here for a time, and what was printed meanwhile is lost.\n")
            super().write(text[start : start + _CHUNK_CHARS])
        return len(text)

    def _wait_for_room(self) -> bool:
        """Not for one that has not been read for so long already."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        self._is_stalled = not poll.poll(0 if self._is_stalled else 1000 * PATIENCE_S)
        return not self._is_stalled


def lose_what_is_not_taken(stream: IO[str]) -> TerminalStream:
    """The same terminal, pipe or file, as a stream that never fails and never waits for long."""
    return TerminalStream(os.fdopen(os.dup(stream.fileno()), "wb", buffering=0), encoding="utf8", write_through=True)


class CopiedStream:
    """`stream`, with a copy of everything written to `log`."""

    def __init__(self, stream: IO[str], log: IO[str]):
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def divert_output(save_dir: Path | None, rank: int) -> tuple[IO[str], Path]:
    """Send stdout, warnings and log records of this process to the log of its rank, appending, and copy stderr there.

    save_dir: None means a folder in the system's temporary directory. Returns the real stdout and the log's path.
    """
    log_dir = find_log_dir(save_dir)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        log_path = find_log(log_dir, rank)
        refuse_pipes(log_dir, raises=ConfigError)
        log_file: IO[str] = LogStream(log_path.open("ab", buffering=0), encoding="utf8", write_through=True)
    except OSError as error:
        raise ConfigError(
            f"save: must be a folder that can be made and written, got {log_dir}: {error.strerror}. "
            "Pass another --save."
        ) from error
    terminal = lose_what_is_not_taken(sys.stdout)
    sys.stdout.flush()
    os.dup2(log_file.fileno(), 1)  # what compiled code prints goes there too
    sys.stdout = log_file
    sys.stderr = CopiedStream(lose_what_is_not_taken(sys.stderr), log_file)  # type: ignore[assignment]
    log_file.write(_describe_process(rank))
    leave_stacks(log_file)

    def write_warning(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
        log_file.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = write_warning
    logging.basicConfig(stream=log_file, level=logging.INFO, force=True)
    return terminal, log_path


def leave_stacks(stream: IO[str]) -> None:
    """Have the stacks of this process written to `stream` where it crashes, and where its launcher asks for them.

    Without this, the signal with which it asks would end the process.
    """
    faulthandler.enable(stream)
    faulthandler.register(STACKS_SIGNAL, stream)


def _describe_process(rank: int) -> str:
    """The line with which each attempt begins in the log."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    attempt = os.environ.get(ATTEMPT_VARIABLE, "0")
    return f"== attempt {attempt} of rank {rank}, {now}, host {socket.gethostname()}, process {os.getpid()} ==\n"
