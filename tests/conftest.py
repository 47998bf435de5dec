"""What every test needs: one thread per process, set before torch is imported, and the signals of a terminal."""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
# nohup and `command &` in a script switch these off, also for what the tests start and stop by them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nearly all that is imported and collected stays until the end, so no search for garbage needs to look at it.
gc.disable()


@pytest.fixture(autouse=True)
def process_left_as_found() -> Iterator[None]:
    """Which tests share a process, and in which order, is chance: none may change what another one finds.

    Environment and signal handlers are put back: Megatron's argument checks set variables, and commands own both in
    their process. Nothing may leave PyTorch or the working directory changed.
    """
    environment, found = dict(os.environ), read_process_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    left = read_process_state()
    changed = {name: (found[name], left[name]) for name in found.keys() & left.keys() if found[name] != left[name]}
    assert not changed, f"the test, or the code it runs, changed its process (before, after): {changed}"


def read_process_state() -> dict[str, object]:
    state: dict[str, object] = {"working directory": os.getcwd()}
    if torch := sys.modules.get("torch"):
        state["deterministic algorithms"] = torch.get_deterministic_debug_mode()
        state["default dtype"] = torch.get_default_dtype()
        state["gradients"] = torch.is_grad_enabled()
        state["threads"] = torch.get_num_threads()
    return state


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
