"""The end of a rank: all ranks end together, and none waits without end on its way out."""

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_hammer.errors import USER_ERROR_EXIT_CODE, HammerError

# Less than the silence after which node 0 takes a launcher for lost that waits for the other nodes' ranks to end.
END_WITHIN_S = 20.0
FINISH_WITHIN_S = 600.0  # for the curve, Weights & Biases and the removal of old checkpoints
_POLL_INTERVAL_S = 0.2
_exit_code: int | None = None


def skip_teardown() -> None:
    """Have a process that `end_soon` ends leave after its exit handlers, without Python's own end of all objects.

    Call it before other modules add their handlers, which are then called before this one. At that end Python calls no
    handler of a signal any more.
    """
    atexit.register(_leave)


def _leave() -> None:
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(_exit_code)


def end_soon(exit_code: int) -> None:
    """End this process with this code within `END_WITHIN_S`, whatever it waits for on its way out.

    Python may wait there without end: for a lock that a killed worker of the data loader had, or for a thread. Nobody
    would hear how the rank ended, and the other ranks would wait for it. The stacks of its threads go to stdout.
    """
    # First: torch's handler raises for a worker that has ended, also where nothing may be raised any more.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    global _exit_code
    _exit_code = exit_code

    def end(number: int, frame: object) -> None:
        faulthandler.dump_traceback(sys.stdout)
        os._exit(exit_code)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, END_WITHIN_S)
    # For compiled code that never returns to Python. Its exit code is always 1.
    faulthandler.dump_traceback_later(END_WITHIN_S + 5.0, exit=True, file=sys.stdout)


@contextlib.contextmanager
def ends_soon() -> Iterator[None]:
    """However the block is left, this process is to end."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except HammerError:
        exit_code = USER_ERROR_EXIT_CODE
        raise
    finally:
        end_soon(exit_code)


def finish_together(
    finish: Callable[[], None],
    *,
    max_over_ranks: Callable[[float], float],
    on_wait: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    """Call `finish()` on every rank and return on all of them at about the same time; raises what it raises.

    A launcher whose ranks have ended waits only seconds for those of other nodes, and then takes the run for lost. What
    takes longer than `FINISH_WITHIN_S` is left. on_wait: called often meanwhile. say: what a person reads.
    """
    errors: list[BaseException] = []
    is_done = threading.Event()

    def call() -> None:
        try:
            finish()
        except BaseException as error:
            errors.append(error)
        finally:
            is_done.set()

    give_up_at_s = time.monotonic() + FINISH_WITHIN_S
    threading.Thread(target=call, name="end of the run", daemon=True).start()
    while max_over_ranks(float(not is_done.wait(_POLL_INTERVAL_S) and time.monotonic() < give_up_at_s)):
        on_wait()
    if errors:
        raise errors[0]
    if not is_done.is_set():
        say(
            f"warning: the end of the run took longer than {FINISH_WITHIN_S / 60:g} minutes and was left. Checkpoints "
            "and metrics are complete; the picture, Weights & Biases or the removal of old checkpoints may not be."
        )
