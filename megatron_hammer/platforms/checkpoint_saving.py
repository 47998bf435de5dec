"""Checkpoints are written by their rank: by a thread of it while it trains, or at once. No process is started for it.

Megatron's worker for `--async-save` is another process. It gets the tensors of a CPU as shared memory that training
then changes (also where /dev/shm is too small for them), needs a CUDA context of its own on a GPU, and if it dies
the run waits for it without end. The thread gets copies. What it calls for long, writing and hashing, holds no GIL.
Megatron's queue of saves, its order and its agreement between ranks on which save is complete stay as they are.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import atexit
import contextlib
import functools
import os
import queue
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

INTERRUPT_S = 60.0  # longer than a tensor takes
_write_failures: list[str] = []


class ResultsQueue(queue.SimpleQueue[Any]):
    """Of one save. Where writing has failed, the file and the reason take the place of megatron's own exception."""

    def put(self, results: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(results, Exception) and _write_failures:
            results = RuntimeError("; ".join(_write_failures))
        _write_failures.clear()
        super().put(results)


def make_results_queue(mp_mode: str = "spawn") -> ResultsQueue:
    """Where the writer of one save leaves its results, in the place of filesystem_async.get_write_results_queue.

    Megatron asks a `multiprocessing.Manager` for one queue, because a writer may be another process. The manager is a
    process with torch imported (589 MB). It shares the rank's process group, so a signal to the group ends it before
    the rank saves, and it outlives a rank that is killed. mp_mode: how megatron would start the manager.
    """
    return ResultsQueue()


def note_write_failures(write: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FileSystemWriterAsync.write_preloaded_data, whose exception its caller reduces to the name of its type."""

    @functools.wraps(write)
    def write_and_note(*args: Any, **kwargs: Any) -> Any:
        output = write(*args, **kwargs)
        if output is not None and isinstance(output[1], Exception):
            error, path = output[1], kwargs["write_bucket"][0]
            reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            _write_failures.append(f"{path} on host {socket.gethostname()}: {reason}")
        return output

    return write_and_note


_is_ending = threading.Event()


def stop_when_ending(write_item: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap filesystem_async._write_item, which writes one tensor: it fails once this process ends.

    A thread of the interpreter that still runs compiled code crashes the process at its end.
    """

    @functools.wraps(write_item)
    def write(*args: Any, **kwargs: Any) -> Any:
        if _is_ending.is_set():
            raise InterruptedError("the process ends")
        return write_item(*args, **kwargs)

    return write


class WriterThread:
    """Writes the saves of this rank one after the other, in the place of async_utils.PersistentAsyncCaller.

    Its methods are what AsyncCallsQueue calls, on every rank in the same order.
    """

    _thread: threading.Thread | None = None
    _tasks: "queue.SimpleQueue[tuple[Future[None], Any] | None]" = queue.SimpleQueue()

    def __init__(self) -> None:
        self._pending: deque[Future[None]] = deque()

    @classmethod
    def _get_process(cls, rank: int, mp_mode: str = "", cpu_priority: int = 0, io_priority: int | None = None) -> None:
        """Start the thread unless it runs. cpu_priority: its nice value. io_priority: its class, for ionice."""
        if cls._thread is None:
            # A daemon: a rank that fails must not wait for a save that its peers can no longer complete.
            atexit.register(cls._interrupt)
            priorities = (cpu_priority, io_priority)
            cls._thread = threading.Thread(
                target=cls._write_all, args=priorities, name="checkpoint writer", daemon=True
            )
            cls._thread.start()

    def schedule_async_call(self, request: Any) -> None:
        """Copy what is to be saved, and have it written. The live state may change when this returns."""
        finished: Future[None] = Future()
        self._pending.append(finished)
        if request.async_fn is None:  # this rank has nothing to write
            finished.set_result(None)
            return
        copy_to_host(request.async_fn_args[1])
        self._get_process(rank=0)
        self._tasks.put((finished, request))

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank has written the oldest save that is not complete. blocking: wait until they have.

        no_dist: ask only this rank.
        """
        if blocking and self._pending:
            self._pending[0].result()
        is_done = not self._pending or self._pending[0].done()
        if not no_dist:
            is_done = _is_true_on_all_ranks(is_done)
        if is_done and self._pending:
            self._pending.popleft()
        return is_done

    def close(self, abort: bool = False) -> None:
        """End the thread when it has written what it was given. abort: give up what has not begun."""
        if abort:
            self._pending.clear()
        cls = type(self)
        if cls._thread is not None:
            cls._tasks.put(None)
            if not abort:
                cls._thread.join()
            cls._thread, cls._tasks = None, queue.SimpleQueue()

    @classmethod
    def _interrupt(cls) -> None:
        """Before the process ends: give up what is not written."""
        _is_ending.set()
        if cls._thread is not None:
            cls._tasks.put(None)
            cls._thread.join(timeout=INTERRUPT_S)

    @classmethod
    def _write_all(cls, cpu_priority: int, io_priority: int | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # for the main thread, which stops the run
        _lower_priority(cpu_priority, io_priority)
        tasks = cls._tasks
        while (task := tasks.get()) is not None:
            finished, request = task
            try:
                _write(request)
            finally:  # else the rank would wait for this save without end
                finished.set_result(None)
            del task, request  # the copies


def copy_to_host(buckets: Sequence[Any]) -> None:
    """Replace the tensors of megatron's WriteBuckets, one after the other, by copies in host memory.

    `Tensor.to("cpu")`, which megatron uses, is no copy of a tensor that is there already.
    """
    for _path, _key, (_bytes, tensors) in buckets:
        for index, (item, tensor) in enumerate(tensors):
            tensors[index] = (item, tensor.to("cpu", copy=True))


def _write(request: Any) -> None:
    """Call what megatron calls in its worker. A failure becomes a result, so that all ranks hear of it."""
    rank, buckets, results = request.async_fn_args
    try:
        request.async_fn(rank, buckets, results, **request.async_fn_kwargs)
    except Exception as error:
        results.put(error)
    for _path, _key, (_bytes, tensors) in buckets:
        tensors.clear()  # the copies; megatron keeps the buckets until all ranks have written


def _is_true_on_all_ranks(value: bool) -> bool:
    import torch

    number = torch.tensor([int(not value)], dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(number)
    return not number.item()


def _lower_priority(cpu_priority: int, io_priority: int | None) -> None:
    """For this thread alone: on Linux a thread has priorities of its own."""
    thread_id = threading.get_native_id()
    # Each may be missing or forbidden, as in a container; they are only a courtesy to other programs.
    with contextlib.suppress(OSError):
        if cpu_priority > os.getpriority(os.PRIO_PROCESS, thread_id):
            os.setpriority(os.PRIO_PROCESS, thread_id, cpu_priority)
    if io_priority is not None:
        with contextlib.suppress(OSError):
            subprocess.run(["ionice", "-c", str(io_priority), "-p", str(thread_id)], capture_output=True, check=False)
