"""What writing a checkpoint needs of megatron that megatron does otherwise.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import queue
from typing import Any


def make_results_queue(mp_mode: str = "spawn") -> "queue.SimpleQueue[Any]":
    """Where the writer of one save leaves its results, in the place of filesystem_async.get_write_results_queue.

    Megatron asks a `multiprocessing.Manager` for one queue, because a writer may be another process. The manager is a
    process with torch imported (589 MB). It shares the rank's process group, so a signal to the group ends it before
    the rank saves, and it outlives a rank that is killed. Here the writer is the rank itself, or a thread of it.
    mp_mode: how megatron would start the manager.
    """
    return queue.SimpleQueue()
