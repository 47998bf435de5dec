"""The errors that a user can cause. Everything else that is raised is a bug of ours.

Each message is one sentence of fact and one of remedy:
`<field or file:line>: <what must hold>, got <name>=<value>. <what to do>.`
Entry points wrap their main in `exit_on_user_error`: user errors leave no stack trace and exit 2. Nor does a
command whose output goes to a program that has ended, such as `head`.
"""

import errno
import functools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as shells have it
NO_READER_EXIT_CODE = 128 + signal.SIGPIPE
FOLLOWER_GRACE_S = 10.0
# What the system answers where a path is wrong, forbidden, or on a disk that is full or failing. A file that is missing
# is not among them: where a user named it, there is a sentence already, and elsewhere it is a bug of ours.
PATH_ERRNOS = frozenset(
    getattr(errno, f"E{name}")
    for name in ("ACCES", "PERM", "ROFS", "NAMETOOLONG", "LOOP", "NOTDIR", "ISDIR", "NOSPC", "DQUOT", "IO", "STALE")
)


class HammerError(Exception):
    """A problem that the user can fix; its text says where, what and how.

    problems: every problem found, one sentence each, so that all are reported at once.
    is_told: rank 0 says it, so the other processes of a node need not.
    """

    is_told = False

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems: Sequence[str] = problems


class ConfigError(HammerError):
    """A flag, a preset, or a combination of them cannot work."""


class DataError(HammerError):
    """A corpus, an indexed data set or a tokenizer is missing, malformed or does not match."""


class ConversionError(HammerError):
    """A checkpoint cannot be mapped to or from another format."""


class CheckpointError(HammerError):
    """A checkpoint is missing, incomplete or does not match."""


class OutputError(HammerError):
    """An output file or folder cannot be written, or something is in its place."""


class PlatformError(HammerError):
    """This machine or this installation cannot do what was asked."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an entry point: a HammerError becomes its lines on stderr and exit code 2, without a stack trace.

    A command whose output is no longer read, as behind `| head`, leaves no stack trace either. If it had done all its
    work, it keeps its exit code. Else the code is 141, as shells report it for a program that the signal SIGPIPE ends.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _open_missing_streams()
        try:
            _refuse_undecodable(sys.argv[1:])
            return main(*args, **kwargs)
        except BrokenPipeError:
            if not _is_stdout_unread():  # a pipe of our own, such as one to another process: a bug
                raise
            sys.exit(NO_READER_EXIT_CODE)
        except (HammerError, OSError) as error:
            problems = error.problems if isinstance(error, HammerError) else _explain_path_error(error)
            if not problems:
                raise
            # Every process of a node usually finds the same problem: the first one says it, and its end ends the
            # others. What only another process finds, that one says after waiting.
            if os.environ.get("LOCAL_RANK", "0") != "0":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the launcher ends the others
                time.sleep(FOLLOWER_GRACE_S)
                if isinstance(error, HammerError) and error.is_told:
                    sys.exit(USER_ERROR_EXIT_CODE)
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
            sys.exit(USER_ERROR_EXIT_CODE)
        finally:
            _flush_stdout()

    return wrapped


def _open_missing_streams() -> None:
    """Let what a command prints go nowhere where it was started without a stream, as by `>&-`.

    Python has None in its place, and the first file that is opened would take its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, descriptor == number)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


def _refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is not UTF-8: manifests, reports and messages could not name it."""
    for argument in arguments:
        raw = os.fsencode(argument)
        if raw.decode(errors="replace") != argument:
            raise ConfigError(
                f"command line: arguments must be UTF-8, got {raw!r}. "
                "Rename the file, or name it through a link or a folder above it."
            )


def _explain_path_error(error: OSError) -> Sequence[str]:
    """Return the sentence for what the system says of a path; nothing for another error, which is a bug of ours."""
    if error.errno not in PATH_ERRNOS or not error.filename:
        return ()
    return (f"{error.filename}: path must be usable, got: {error.strerror}. Check the path, its permissions and disk.",)


def _is_stdout_unread() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # POLLERR, which a pipe without a reader has, is always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush_stdout() -> None:
    """Write what print() has buffered: at its end, the interpreter would report a missing reader with a stack trace."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere when the interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_interrupt(consequence: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap an entry point: Ctrl-C, or SIGTERM, which schedulers send, becomes one line and exit code 130.

    consequence: what is left, for that line.
    """

    def wrap(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            old_handler = signal.signal(signal.SIGTERM, _raise_interrupt)
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                print(f"error: interrupted; {consequence}. Run the same command again.", file=sys.stderr)
                sys.exit(INTERRUPTED_EXIT_CODE)
            finally:
                signal.signal(signal.SIGTERM, old_handler)

        return wrapped

    return wrap


def _raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
