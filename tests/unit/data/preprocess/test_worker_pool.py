"""The pool keeps the order, bounds the blocks in progress, and ends when a worker, the input or the parent ends."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from megatron_hammer.corpus.blocks import Block, BlockKind, Position
from megatron_hammer.data.preprocess import worker_pool
from megatron_hammer.data.preprocess.block_encoder import EncodedBlock, EncodedField
from megatron_hammer.data.preprocess.worker_pool import encode_in_order, receive_object, send_object
from megatron_hammer.errors import DataError, PlatformError


def make_blocks(count: int, size_bytes: int = 100) -> Iterator[Block]:
    for n in range(count):
        yield Block(BlockKind.LINES, bytes(size_bytes), Position(0, n, n), Position(0, n + 1, n + 1))


def encode(block: Block) -> EncodedBlock:
    """An answer larger than the buffer of a pipe; the first of each ten blocks takes longest."""
    number = block.begin.num_records
    time.sleep(0.01 * (number % 10 == 0))
    field = EncodedField(np.full(50_000, number), np.array([50_000]), np.array([1]), len(block.payload))
    return EncodedBlock(block.begin, block.end, (field,), ())


def refuse_seventh(block: Block) -> EncodedBlock:
    if block.begin.num_records == 7:
        raise DataError("seven: must not be")
    return encode(block)


def fail_at_seventh(block: Block) -> EncodedBlock:
    return encode(block) if block.begin.num_records < 7 else 1 // 0  # type: ignore[return-value]


def die_at_seventh(block: Block) -> EncodedBlock:
    if block.begin.num_records == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(block)


class Recipe:
    """Sendable; builds the function when it is called in the worker."""

    def __init__(self, function: Callable[[Block], EncodedBlock]):
        self._function = function

    def __call__(self) -> Callable[[Block], EncodedBlock]:
        return self._function


def note_numbers(results: Iterable[EncodedBlock], numbers: list[int]) -> None:
    for result in results:
        numbers.append(result.begin.num_records)


def numbers_of(blocks: Iterator[Block], function: Callable[[Block], EncodedBlock], num_workers: int) -> list[int]:
    return [encoded.begin.num_records for encoded in encode_in_order(blocks, lambda: Recipe(function), num_workers)]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_order_is_kept(num_workers: int) -> None:
    results = list(encode_in_order(make_blocks(60), lambda: Recipe(encode), num_workers))
    assert [int(result.fields[0].ids[-1]) for result in results] == list(range(60))
    assert [result.begin.num_records for result in results] == list(range(60))


def test_the_number_of_blocks_in_progress_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "MAX_BYTES_IN_FLIGHT", 1000)
    num_read = 0

    def count(blocks: Iterator[Block]) -> Iterator[Block]:
        nonlocal num_read
        for block in blocks:
            num_read += 1
            yield block

    for num_done, _ in enumerate(encode_in_order(count(make_blocks(40, 400)), lambda: Recipe(encode), 2)):
        assert num_read <= num_done + 4  # two of 400 bytes, one that waits, and the one that is being yielded
    assert num_read == 40
    assert numbers_of(make_blocks(5, 5000), encode, 2) == [0, 1, 2, 3, 4]  # each larger than the bound


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_comes_at_its_block(num_workers: int) -> None:
    done: list[int] = []
    with pytest.raises(DataError, match="seven: must not be"):
        note_numbers(encode_in_order(make_blocks(30), lambda: Recipe(refuse_seventh), num_workers), done)
    assert done == [0, 1, 2, 3, 4, 5, 6]
    assert not multiprocessing.active_children()


def test_a_bug_in_a_worker_keeps_its_trace() -> None:
    with pytest.raises(RuntimeError, match=r"a worker failed:\n(?s:.*)ZeroDivisionError"):
        numbers_of(make_blocks(30), fail_at_seventh, 2)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_the_input_comes_after_what_was_before_it(num_workers: int) -> None:
    def broken() -> Iterator[Block]:
        yield from make_blocks(9)
        raise DataError("the archive is truncated")

    done: list[int] = []
    with pytest.raises(DataError, match="the archive is truncated"):
        note_numbers(encode_in_order(broken(), lambda: Recipe(encode), num_workers), done)
    assert done == list(range(9))


def test_a_dead_worker_is_an_error() -> None:
    message = (
        r"^workers: every worker must live to the end, got one that died near c.jsonl:\d+. It was killed, most often "
        r"for want of memory; pass fewer --workers or use a machine with more memory.$"
    )

    def locate(position: Position) -> str:
        return f"c.jsonl:{position.num_records + 1}"

    with pytest.raises(PlatformError, match=message):
        list(encode_in_order(make_blocks(30), lambda: Recipe(die_at_seventh), 2, locate))
    assert not multiprocessing.active_children()


def test_workers_end_when_the_caller_stops_early() -> None:
    results = encode_in_order(make_blocks(1000), lambda: Recipe(encode), 2)
    assert next(results).begin.num_records == 0
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


def send_half(connection: Any) -> None:
    """Die in the middle of a message that is larger than the pipe's buffer."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    send_object(connection, np.zeros(10_000_000))


def test_half_a_message_is_the_end_of_its_sender() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sender = context.Process(target=send_half, args=(theirs,))
    sender.start()
    theirs.close()
    sender.join()
    with pytest.raises(EOFError):
        receive_object(ours)


@pytest.mark.parametrize("payload", [b"abc\n", bytearray(b"abc\n")])
def test_payloads_come_as_they_were_sent(payload: bytes | bytearray) -> None:
    ours, theirs = multiprocessing.Pipe()
    block = Block(BlockKind.LINES, payload, Position(1, 2, 3), Position(4, 5, 6))
    send_object(ours, block)
    received = receive_object(theirs)
    assert received == block
    assert isinstance(received.payload, bytes | bytearray)


def test_arrays_come_as_they_were_sent() -> None:
    ours, theirs = multiprocessing.Pipe()
    for array in (np.arange(5, dtype=np.uint16), np.empty(0, np.int32)):
        send_object(ours, array)
        received = receive_object(theirs)
        assert received.dtype == array.dtype
        assert received.tolist() == array.tolist()
