"""The bounds of the elements of a JSON array that is larger than memory, found without parsing them.

A buffer slides over the array; strings are skipped whole, brackets are counted, and a comma outside both ends an
element. Whether an element is valid JSON is for its parser to say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# The lone quote comes last: it matches a string that continues beyond the buffer.
# `*+` does not backtrack, so a string without an end costs one pass over the buffer.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\],"]', re.DOTALL)


class BrokenArrayError(ValueError):
    """The array has no end, or something follows it."""


@dataclass(frozen=True, slots=True)
class ElementRun:
    """Neighbouring elements as they stand in the file, commas between them; `end` is where the next one begins.

    end: bytes from the stream's position before the call, or None after the last element.
    """

    payload: bytes
    num_elements: int
    end: int | None


def cut_elements(stream: BinaryIO, run_bytes: int, *, is_first: bool) -> Iterator[ElementRun]:
    """Yield runs of at least `run_bytes` from a stream that is positioned after `[` or after a comma between elements.

    is_first: it is positioned after `[`, where `]` may follow at once. Raises BrokenArrayError.
    Memory: the longest element, twice.
    """
    cutter = _Cutter(run_bytes)
    while True:
        # as much again as is unfinished: an element of any length is scanned a bounded number of times
        chunk = stream.read(max(run_bytes, cutter.unfinished_bytes))
        if not chunk:
            raise BrokenArrayError("the array has no end")
        yield from cutter.scan(chunk)
        if cutter.is_complete:
            break
    last = cutter.last_run(is_first)
    # One object per line after the array would otherwise be left out without a message.
    if cutter.rest.strip() or any(chunk.strip() for chunk in iter(lambda: stream.read(run_bytes), b"")):
        raise BrokenArrayError("something follows the array")
    if last.num_elements:
        yield last


class _Cutter:
    def __init__(self, run_bytes: int):
        self._run_bytes = run_bytes
        self._buffer = b""
        self._scanned = 0  # the buffer up to here has been looked at
        self._buffer_offset = 0  # of the buffer's first byte in the stream
        self._depth = 0
        self._num_elements = 0  # complete ones in the buffer
        self._num_runs = 0
        self.is_complete = False

    @property
    def unfinished_bytes(self) -> int:
        return len(self._buffer)

    @property
    def rest(self) -> bytes:
        """What was read beyond the end of the array."""
        return self._buffer[self._scanned + 1 :]  # + 1: the closing bracket

    def scan(self, chunk: bytes) -> Iterator[ElementRun]:
        """Yield the runs that are complete with this chunk, and keep the rest for the next one."""
        self._buffer += chunk
        start = 0  # of the run that is growing
        for match in _TOKEN.finditer(self._buffer, self._scanned):
            token = match[0]
            if token == b'"':  # the string is not complete yet
                break
            if token in b"{[":
                self._depth += 1
            elif token in b"}]":
                # Brackets of elements are counted, so this one closes the array itself.
                if self._depth == 0:
                    self._scanned = match.start()
                    self.is_complete = True
                    break
                self._depth -= 1
            elif token == b"," and self._depth == 0:
                self._num_elements += 1
                if match.start() - start >= self._run_bytes:
                    yield self._take(start, match.start())
                    start = match.end()
            # Inside the loop: after `break`, the next call begins at the string that was not complete.
            self._scanned = match.end()
        self._buffer = self._buffer[start:]
        self._buffer_offset += start
        self._scanned -= start

    def last_run(self, is_first: bool) -> ElementRun:
        payload = self._buffer[: self._scanned]
        # Without a comma, `[]` has no element and `[1]` has one. A resumed run begins after a comma: it has an element.
        is_empty_array = is_first and not self._num_runs and not self._num_elements and not payload.strip()
        return ElementRun(payload, 0 if is_empty_array else self._num_elements + 1, None)

    def _take(self, start: int, end: int) -> ElementRun:
        # + 1: the comma after the run belongs to no run.
        run = ElementRun(self._buffer[start:end], self._num_elements, self._buffer_offset + end + 1)
        self._num_elements = 0
        self._num_runs += 1
        return run


def split_elements(payload: bytes | bytearray) -> list[bytes | bytearray]:
    """Return the elements of an ElementRun, each as it stands in the file."""
    ends = []
    depth = 0
    for match in _TOKEN.finditer(payload):
        token = match[0]
        if token in b"{[":
            depth += 1
        elif token in b"}]":
            depth -= 1
        elif token == b"," and depth == 0:
            ends.append(match.start())
    starts = [0, *(end + 1 for end in ends)]
    return [payload[start:end].strip() for start, end in zip(starts, [*ends, len(payload)], strict=True)]
