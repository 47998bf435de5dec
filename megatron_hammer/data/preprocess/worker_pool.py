"""A pool of processes for blocks: results come back in order, and the memory of all blocks in flight is bounded.

Each worker has a pipe of its own. When a worker dies, even in the middle of a message, its pipe closes and the parent
notices. When the parent dies, the workers' pipes close and they exit at once. A pool of the standard library shares one
pipe between its workers and can wait forever for the rest of a message whose sender was killed.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from megatron_hammer.corpus.blocks import Block, Position
from megatron_hammer.errors import HammerError, PlatformError

# Encoded blocks wait for the slowest one before them, so their number must be bounded.
MAX_BYTES_IN_FLIGHT = 32 << 20  # a single block may be larger; then no other is in flight
MAX_BLOCKS_PER_WORKER = 3  # one in work, one waiting in the worker, one on its way
# A worker notices the closed pipe at once, unless a long call of a C library holds the interpreter lock.
JOIN_TIMEOUT_S = 5.0

type BuildEncode[T] = Callable[[], Callable[[Block], T]]


def encode_in_order[T](
    blocks: Iterable[Block],
    prepare: Callable[[], BuildEncode[T]],
    num_workers: int,
    locate: Callable[[Position], str] = str,
) -> Generator[T]:
    """Yield what becomes of each block, in the order of the input; with one worker, in this process.

    prepare: called once, here, while the workers start; what it returns is sent to each and called there. locate:
    file:line for messages.
    An error of `blocks` is raised after everything before it has been yielded, and one of a worker at its block.
    Raises PlatformError as soon as a worker has died.
    """
    # A second process would only add the cost of the pipe.
    if num_workers == 1:
        encode = prepare()()
        yield from (encode(block) for block in blocks)
        return
    pool = _Pool[T](locate)
    try:
        pool.start(num_workers)
        # While they start: interpreter and imports of a worker take longer than preparing the recipe.
        pool.send_recipe(prepare())
        yield from pool.run(_Feed(iter(blocks)))
    finally:
        pool.stop()


def count_cores() -> int:
    """Return the cores that this process may use, which a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Feed:
    """The blocks, read only when they are asked for, and the error that ended them."""

    def __init__(self, blocks: Iterator[Block]):
        self._blocks = blocks
        self._is_at_end = False
        self.error: Exception | None = None

    def take(self) -> Block | None:
        """Return the next block, or None if there is none."""
        if self._is_at_end:
            return None
        try:
            block = next(self._blocks, None)
        except Exception as error:
            self.error = error
            block = None
        self._is_at_end = block is None
        return block


class _Worker:
    """The parent's end of one process; `in_hand`: number and beginning of the blocks sent and not yet answered."""

    def __init__(self) -> None:
        # spawn: a fork would copy the caller's threads and their locks in an undefined state
        context = multiprocessing.get_context("spawn")
        self.in_hand: deque[tuple[int, Position]] = deque()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        resource_tracker.ensure_running()  # it is started with the first process and unblocks signals
        # these reach every process of a terminal or a job; a worker leaves them to the parent
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
            theirs.close()


class _Pool[T]:
    def __init__(self, locate: Callable[[Position], str]):
        self._locate = locate
        self._workers: list[_Worker] = []
        self._results: dict[int, T | Exception] = {}
        self._sizes_bytes: deque[int] = deque()  # of the blocks under way, in order
        self._first = 0  # number of the oldest of them
        self._waiting: Block | None = None

    def start(self, num_workers: int) -> None:
        for _ in range(num_workers):
            self._workers.append(_Worker())

    def send_recipe(self, build_encode: BuildEncode[T]) -> None:
        for worker in self._workers:
            try:
                send_object(worker.connection, build_encode)
            except OSError as error:
                raise self._explain_death(worker) from error

    def run(self, feed: _Feed) -> Iterator[T]:
        while True:
            self._send(feed)
            if not self._sizes_bytes:
                break
            # Only the oldest block may go out; later ones that are ready wait in `_results`.
            if self._first in self._results:
                yield self._take()
            else:
                self._receive()
        if feed.error is not None:
            raise feed.error

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        # All pipes close first, so that the workers exit at the same time.
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(JOIN_TIMEOUT_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _send(self, feed: _Feed) -> None:
        """Hand out blocks as long as a worker has room and memory allows; one more may be read and wait for that."""
        while sum(self._sizes_bytes) < MAX_BYTES_IN_FLIGHT:
            # The least busy worker, so that one slow block does not hold up the others.
            worker = min(self._workers, key=lambda worker: len(worker.in_hand))
            if len(worker.in_hand) >= MAX_BLOCKS_PER_WORKER:
                return
            # A block that was read but did not fit comes first: the order of the input is kept.
            block = self._waiting or feed.take()
            self._waiting = None
            if block is None:
                return
            # Already read, but too large for the memory that is left: it waits until results have been taken.
            if self._sizes_bytes and sum(self._sizes_bytes) + len(block.payload) > MAX_BYTES_IN_FLIGHT:
                self._waiting = block
                return
            worker.in_hand.append((self._first + len(self._sizes_bytes), block.begin))
            self._sizes_bytes.append(len(block.payload))
            try:
                send_object(worker.connection, block)
            except OSError as error:
                raise self._explain_death(worker) from error
            del block  # a large one must not stay while the next is read

    def _receive(self) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.in_hand}
        for connection in wait(list(busy)):
            worker = busy[cast(Connection, connection)]
            try:
                result = receive_object(worker.connection)
            except (EOFError, OSError) as error:
                raise self._explain_death(worker) from error
            number, _ = worker.in_hand.popleft()
            self._results[number] = result

    def _take(self) -> T:
        result = self._results.pop(self._first)
        self._first += 1
        self._sizes_bytes.popleft()
        # Raised in its turn, so that the same input fails at the same block whatever the number of workers.
        if isinstance(result, Exception):
            raise result
        return result

    def _explain_death(self, worker: _Worker) -> PlatformError:
        place = f"near {self._locate(worker.in_hand[0][1])}" if worker.in_hand else "as it started"
        return PlatformError(
            f"workers: every worker must live to the end, got one that died {place}. "
            "It was killed, most often for want of memory; pass fewer --workers or use a machine with more memory."
        )


def _serve(connection: Connection) -> None:
    """The worker: take what makes its function, then answer every block until the parent's end of the pipe is gone."""
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # daemon: at the end of the process nobody waits for it.
    threading.Thread(target=_receive_all, args=(connection, received), daemon=True).start()
    build_encode: BuildEncode[Any] = received.get()
    encode: Callable[[Block], Any] | None = None
    while True:
        try:
            encode = encode or build_encode()
            answer = encode(received.get())  # not kept here: a large one must go as soon as it is decoded
        except Exception as error:
            # An error of ours has its sentence. Any other loses its stack trace on the way, so it is sent as text.
            is_explained = isinstance(error, HammerError)
            answer = error if is_explained else RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
        with suppress(OSError):  # then the parent is gone, and so is this process in a moment
            send_object(connection, answer)
        del answer


def _receive_all(connection: Connection, received: "queue.SimpleQueue[Any]") -> None:
    """Always ready to receive, so that the parent never waits for a worker that waits for the parent."""
    with suppress(EOFError, OSError):
        while True:
            received.put(receive_object(connection))
    # The parent is gone. Not sys.exit: that would end this thread only.
    os._exit(0)


def send_object(connection: Connection, thing: Any) -> None:
    """Send with pickle; what is large in it, as arrays and payloads, goes from its own memory, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    # The sizes first: the receiver allocates the buffers before it reads into them.
    connection.send_bytes(pickle.dumps([view.nbytes for view in views]))
    connection.send_bytes(head)
    for view in views:
        while view:
            view = view[os.write(connection.fileno(), view) :]


def receive_object(connection: Connection) -> Any:
    """Receive what `send_object` sent; raises EOFError where the other end is gone, even in the middle of it."""
    buffers = [bytearray(size_bytes) for size_bytes in pickle.loads(connection.recv_bytes())]
    head = connection.recv_bytes()
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            num_bytes = os.readv(connection.fileno(), [view])  # Connection's own way holds what it receives twice
            if num_bytes == 0:
                raise EOFError
            view = view[num_bytes:]
    return pickle.loads(head, buffers=buffers)
