"""Workers of megatron's data loaders that end with their rank, however it ends.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from megatron_hammer.platforms.parent_process import end_with_parent
from megatron_hammer.platforms.stop_signals import STOP_SIGNALS


def end_workers_with_rank(build_loader: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap build_pretraining_data_loader, whose workers catch SIGTERM and do nothing.

    That keeps them alive while a stopped run saves, but it is also how Python ends them before it waits for them when a
    rank fails. And a worker of a killed rank holds the rank's connections, so the other ranks would not hear of its
    death for the 5 s after which torch's workers look for their parent.
    """

    @functools.wraps(build_loader)
    def build(*args: Any, **kwargs: Any) -> Any:
        loader, rank = build_loader(*args, **kwargs), os.getpid()
        init = getattr(loader, "worker_init_fn", None)
        if init is None:
            return loader  # it has no workers

        def init_worker(index: int) -> None:
            end_with_parent(rank)
            # One to a whole process group is for the rank, which needs its workers until it has saved.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            init(index)

        loader.worker_init_fn = init_worker
        return loader

    # After multiprocessing is imported, so that Python calls it before multiprocessing's own, which waits.
    atexit.register(kill_workers)
    return build


def kill_workers() -> None:
    """End the worker processes of this one."""
    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failed worker
        for worker in workers:
            worker.kill()
