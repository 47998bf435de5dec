"""What a rank leaves when an error ends it: one line for its launcher, and its stack where a person looks for it."""

import contextlib
import functools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_hammer.errors import HammerError
from megatron_hammer.training.supervision.ending import end_soon
from megatron_hammer.training.supervision.progress import PROGRESS_VARIABLE

_MAX_CHARS = 400
# What gloo, NCCL and the store of the process group say when another rank is gone: its end is the cause, not this one.
_LOST_CONNECTION = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket Timeout|gloo.*(error|Timed out)"
    r"|recvValue failed|NCCL (communicator was aborted|Error 6)|ncclRemoteError|timeout caused pair closure",
    re.IGNORECASE | re.DOTALL,
)


def find_note(directory: Path, local_rank: int) -> Path:
    return directory / f"note-{local_rank}"


def is_lost_connection(text: str) -> bool:
    """Whether this error of a rank only says that another rank has ended or does not answer."""
    return _LOST_CONNECTION.search(text) is not None


def explain_group_error(text: str, environment: Mapping[str, str]) -> str | None:
    """One sentence for an error of torch that ranks did not find each other; None for any other error."""
    address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    if "EADDRINUSE" in text:
        return (
            f"MASTER_PORT: must be free on the host of rank 0, got {address}, which another process has. "
            "Give all ranks another one."
        )
    if re.search(r"client socket has (timed out|failed to connect)", text):
        return (
            f"MASTER_ADDR: rank 0 must answer at {address}, got no connection. Check that rank 0 has started there, "
            "and that this host can reach it."
        )
    joined = re.search(r"(\d+)/(\d+) clients joined", text)
    if joined is not None:
        return (
            f"WORLD_SIZE: all {joined[2]} ranks must come to {address}, got {joined[1]}. Look for the ranks that did "
            "not start, or set WORLD_SIZE to the number of those that do."
        )
    return None


def explain_lost_worker(text: str) -> str | None:
    """One sentence for an error of torch that a process of the data loader has ended; None for any other error."""
    worker = re.search(
        r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)? (is killed by signal: \w+|exited unexpectedly)", text
    )
    if worker is None:
        return None
    return (
        f"num-workers: processes that load data must live as long as the run, got process {worker[1]}, which "
        f"{worker[2]}. If the host has no memory left, use fewer --num-workers, or 0; then start again."
    )


def find_lost_worker() -> str:
    """What torch says of a process of the data loader that has ended; empty if none has.

    The error that a rank meets first may be another one, such as a connection that the worker had.
    """
    torch = sys.modules.get("torch")  # else there is no data loader
    if torch is not None:
        time.sleep(0.1)  # its connections are closed shortly before it has ended
        try:
            torch._C._error_if_any_worker_fails()
        except RuntimeError as error:
            return str(error)
    return ""


def leave_last_words() -> None:
    """Have an error that ends this process noted for the launcher, and end it soon from then.

    The stack of a lost connection goes to stdout, which is the log of the rank: on the terminal the stacks of all
    other ranks would bury the one that matters.
    """
    show = sys.excepthook

    def note_and_show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        end_soon(1)
        text = f"{kind.__name__}: {error}"
        sentence = explain_group_error(text, os.environ) or explain_lost_worker(f"{text} {find_lost_worker()}")
        write_note(sentence or text)
        if sentence is None and not is_lost_connection(text):
            show(kind, error, trace)
            return
        traceback.print_exception(kind, error, trace, file=sys.stdout)
        sys.stdout.flush()
        if sentence is not None:
            print(f"error: {sentence}", file=sys.stderr)
        elif PROGRESS_VARIABLE not in os.environ:  # else the launcher says it
            print(f"error: lost the connection to another rank: {error}", file=sys.stderr)

    sys.excepthook = note_and_show


def note_user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an entry point below `exit_on_user_error`: the first problem is noted for the launcher."""

    @functools.wraps(main)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return main(*arguments, **options)
        except HammerError as error:
            write_note(error.problems[0])
            raise

    return wrapped


def write_note(text: str) -> None:
    """Leave `text` for the launcher, shortened to one line."""
    directory = os.environ.get(PROGRESS_VARIABLE)
    if directory is None:
        return
    line = " ".join(text.split())[:_MAX_CHARS]
    with contextlib.suppress(OSError):  # its launcher is gone, or the disk full; the log has the error too
        find_note(Path(directory), int(os.environ["LOCAL_RANK"])).write_text(line, encoding="utf-8")


def read_note(directory: Path, local_rank: int) -> str | None:
    """What the rank has left; None if nothing."""
    try:
        return find_note(directory, local_rank).read_text(encoding="utf-8", errors="replace") or None
    except OSError:
        return None
