"""A sample of the lines of one or several sources, weighted, in one pass and in memory for the sample only."""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.corpus.byte_streams import OnBytesRead
from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Inputs that share a weight: files, globs or directories. `weight` is relative to those of the other sources."""

    inputs: tuple[str | Path, ...]
    weight: float = 1.0

    @property
    def name(self) -> str:
        first = str(self.inputs[0])
        return first if len(self.inputs) == 1 else f"{first} and {len(self.inputs) - 1} more"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """What a source held and what was taken of it. quota_bytes: its share of the sample; None if all was wanted."""

    name: str
    weight: float
    num_documents: int
    text_bytes: int
    num_sampled_lines: int
    sampled_bytes: int
    quota_bytes: int | None
    is_used_whole: bool

    @property
    def shortfall_bytes(self) -> int:
        """The bytes by which a source that is used whole falls short of its share."""
        return max(0, (self.quota_bytes or 0) - self.sampled_bytes) if self.is_used_whole else 0


def parse_sources(items: Sequence[str]) -> tuple[TextSource, ...]:
    """Read inputs as Megatron's --data-path: paths alone (one source), or weights, each before its path or paths.

    Raises ConfigError for weights that are not positive, are followed by no path, or are missing before the first path.
    """
    numbers = [_parse_weight(item) for item in items]
    if all(number is None for number in numbers):
        return (TextSource(inputs=tuple(items)),)
    problems = [
        f"input: weight must be a positive number, got {item}. Use a share or a ratio such as 0.7."
        for item, number in zip(items, numbers, strict=True)
        if number is not None and not (math.isfinite(number) and number > 0)
    ]
    if numbers[0] is None:
        problems.append(
            f"input: either every source has a weight or none, got {items[0]} without one. Put a weight before it."
        )
    for item, number, following in zip(items, numbers, [*numbers[1:], math.nan], strict=True):
        if number is not None and following is not None:
            problems.append(f"input: weight must stand before a path, got {item} before none. Add the path.")
    if problems:
        raise ConfigError(*problems)
    starts = [position for position, number in enumerate(numbers) if number is not None]
    return tuple(
        TextSource(inputs=tuple(items[start + 1 : end]), weight=float(items[start]))
        for start, end in zip(starts, [*starts[1:], len(items)], strict=True)
    )


def _parse_weight(item: str) -> float | None:
    try:
        weight = float(item)
    except ValueError:
        return None
    # A folder may be called 2024; guessing would change the weights of all sources.
    if Path(item).exists():
        raise ConfigError(f"input: must be a weight or a path, got {item}, which is both. Write ./{item} for the path.")
    return weight


def sample_sources(
    sources: Sequence[TextSource],
    *,
    json_key: str,
    max_bytes: int | None,
    max_line_bytes: int,
    seed: int,
    on_bytes_read: OnBytesRead = lambda num_bytes: None,
) -> tuple[list[bytes], tuple[SourceCounts, ...]]:
    """Return lines of the sources, as UTF-8 and in their order, of at most `max_bytes` together (all of them if None).

    Each source gives its share of the bytes by weight; one that has less is used whole, and the sample is smaller.
    max_line_bytes: longer lines are cut. Raises DataError where inputs cannot be read.
    """
    find_input_files([item for source in sources for item in source.inputs])  # one file in two sources is refused
    total_weight = math.fsum(source.weight for source in sources)
    sample: list[bytes] = []
    counts = []
    for number, source in enumerate(sources):
        quota = None if max_bytes is None else int(max_bytes * (source.weight / total_weight))
        lines = _TextLines(source.inputs, json_key, max_line_bytes, on_bytes_read)
        part = list(lines) if quota is None else sample_within(lines, len, max_bytes=quota, seed=f"{seed}:{number}")
        sampled_bytes = sum(map(len, part))
        sample += part
        counts.append(
            SourceCounts(
                name=source.name,
                weight=source.weight,
                num_documents=lines.num_documents,
                text_bytes=lines.text_bytes,
                num_sampled_lines=len(part),
                sampled_bytes=sampled_bytes,
                quota_bytes=quota,
                is_used_whole=len(part) == lines.num_lines,
            )
        )
    return sample, tuple(counts)


def count_fitting_bytes(counts: Sequence[SourceCounts]) -> int:
    """Return the largest sample in which every source can have its share."""
    total_weight = math.fsum(count.weight for count in counts)
    # Only a source that is used whole can be too small for its share.
    whole = [count for count in counts if count.is_used_whole]
    return int(min((count.sampled_bytes * total_weight / count.weight for count in whole), default=0))


def sample_within[T](
    items: Iterable[T], count_bytes: Callable[[T], int], *, max_bytes: int, seed: int | str
) -> list[T]:
    """Return a uniform random sample of the items, of at most `max_bytes` together, in their original order.

    Each item draws a random number, and the sample is all items whose draw is below the first that no longer fits:
    one pass, and memory for the sample only.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, int, T]] = []  # a heap whose first entry has the largest draw, as -draw
    kept_bytes = 0
    limit = 1.0
    for position, item in enumerate(items):
        value = draw()
        if value >= limit:
            continue
        num_bytes = count_bytes(item)
        heapq.heappush(kept, (-value, position, num_bytes, item))
        kept_bytes += num_bytes
        while kept_bytes > max_bytes:
            largest, _, dropped_bytes, _ = heapq.heappop(kept)
            # Without this limit, a short item could take the room that a dropped longer one has left.
            limit = -largest
            kept_bytes -= dropped_bytes
    return [item for _, _, _, item in sorted(kept, key=lambda entry: entry[1])]


def cut_line(line: bytes, max_bytes: int) -> Iterator[bytes]:
    """Yield the line in pieces of at most `max_bytes`, cut at a space where there is one, never inside a character."""
    start = 0
    while len(line) - start > max_bytes:
        end = line.rfind(b" ", start + 1, start + max_bytes)
        if end < 0:
            end = start + max_bytes
            # At most three steps back.
            while line[end] & 0xC0 == 0x80:  # a continuation byte of UTF-8
                end -= 1
        yield line[start:end]
        start = end
    yield line[start:]


class _TextLines:
    """The lines of all documents as UTF-8, cut at `max_line_bytes`; counts the lines and bytes that it has yielded."""

    def __init__(self, inputs: Sequence[str | Path], json_key: str, max_line_bytes: int, on_bytes_read: OnBytesRead):
        self._inputs = inputs
        self._json_key = json_key
        self._max_line_bytes = max_line_bytes
        self._on_bytes_read = on_bytes_read
        self.num_documents = 0
        self.num_lines = 0
        self.text_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for document in read_documents(self._inputs, self._json_key, self._on_bytes_read):
            encoded = document.text.encode("utf-8")
            self.num_documents += 1
            self.text_bytes += len(encoded)
            for line in encoded.split(b"\n"):
                # sentencepiece drops empty lines; here they would count as sampled.
                if line.strip():
                    for part in cut_line(line, self._max_line_bytes):
                        self.num_lines += 1
                        yield part
