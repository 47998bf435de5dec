"""What every test needs: one thread per process, set before torch is imported, and the signals of a terminal."""

import gc
import os
import signal

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
# nohup and `command &` in a script switch these off, also for what the tests start and stop by them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nearly all that is imported and collected stays until the end, so no search for garbage needs to look at it.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave what there is by now out of every search for garbage, of this process and of those that it forks."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Else the libraries in C++ report what is frozen as leaked."""
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long part of tests/faults unless the command asks for it."""
    if "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: bash tests/run.sh tests/faults -m long"))
