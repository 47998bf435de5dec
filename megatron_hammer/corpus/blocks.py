"""Input files as blocks of neighbouring documents, and blocks as texts.

Reading is split in two so that the costly half can run elsewhere: `read_blocks` only finds where documents begin and
end, `decode_block` parses them and may run in another process. Every block knows the position after it, from which
another run can continue: a plain file is opened at that offset, an archive is decompressed up to it, and earlier row
groups of a Parquet file are skipped. Lines, elements of JSON arrays and rows are streamed; a .txt file is one document
and must fit in memory.
"""

import enum
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_hammer.corpus.byte_streams import (
    READ_BUFFER_BYTES,
    UTF8_BOM,
    OnBytesRead,
    explain_read_error,
    open_decompressed,
    skip_to,
    starts_with_bracket,
)
from megatron_hammer.corpus.input_files import bare_name, is_compressed
from megatron_hammer.corpus.json_array import BrokenArrayError, cut_elements, split_elements
from megatron_hammer.corpus.json_records import (
    BadRecordError,
    decode_json_record,
    decode_plain_lines,
    decode_utf8,
    select_texts,
)
from megatron_hammer.corpus.parquet_rows import count_rows, decode_parquet_rows, read_row_batches
from megatron_hammer.errors import DataError

# Small enough for the memory limit, and large enough that the pipe between processes does not hold workers back.
BLOCK_BYTES = 1024 * 1024


class BlockKind(enum.Enum):
    """What the payload of a block is."""

    LINES = "lines"  # JSON objects, one per line
    ELEMENTS = "elements"  # of a JSON array, as they stand in the file, with the commas between them
    ROWS = "rows"  # of a Parquet file, as an Arrow stream
    TEXT = "text"  # one document


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two documents: the file, the offset in it, and the documents of that file before it.

    offset: decompressed bytes, or rows of a Parquet file. num_records: lines, rows or elements since the beginning of
    the slice.
    """

    file_index: int = 0
    offset: int = 0
    num_records: int = 0


@dataclass(frozen=True, slots=True)
class FileSlice:
    """The documents of a file that start in bytes `start` to `end` of it; `is_whole`: all of them."""

    path: Path
    start: int
    end: int
    is_whole: bool

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring documents of one file; `begin` and `end` are the positions around them."""

    kind: BlockKind
    payload: bytes | bytearray
    begin: Position
    end: Position

    def __reduce__(self) -> tuple[Any, ...]:
        """Let pickle send the payload without copying it."""
        return _rebuild_block, (self.kind, pickle.PickleBuffer(self.payload), self.begin, self.end)


def _rebuild_block(kind: BlockKind, payload: Any, begin: Position, end: Position) -> Block:
    # pickle wraps a buffer that was read-only in the sending process in a memoryview
    return Block(kind, cast(bytearray, payload.obj) if isinstance(payload, memoryview) else payload, begin, end)


@dataclass(frozen=True, slots=True)
class DecodedBlock:
    """columns: the texts of each key. problems: for each bad record, its place in the block from 0, and a sentence."""

    columns: tuple[list[str], ...]
    problems: tuple[tuple[int, str], ...]


def select_whole_files(files: Sequence[Path]) -> tuple[FileSlice, ...]:
    """Return a slice for each file that holds all of it."""
    return tuple(FileSlice(path, 0, path.stat().st_size, is_whole=True) for path in files)


def is_cuttable(path: Path) -> bool:
    """Say whether reading can begin in the middle of the file: plain lines and Parquet rows, but no JSON array."""
    if is_compressed(path) or bare_name(path).endswith(".txt"):
        return False
    if not bare_name(path).endswith(".json"):
        return True
    with open(path, "rb") as file:
        return not starts_with_bracket(file)


def read_blocks(
    slices: Sequence[FileSlice],
    json_keys: Sequence[str],
    *,
    start: Position = Position(),
    on_bytes_read: OnBytesRead = lambda num_bytes: None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Yield the documents of the slices from `start` on; a document larger than a block gets its own block.

    json_keys: only these columns of a Parquet file are read. on_bytes_read: called with the size on disk of each chunk,
    read or skipped. Raises DataError if a file cannot be read to its end: a broken or truncated archive, an unreadable
    file.
    """
    # Files that an earlier run has read count as read: the reported bytes must add up to the size of all files.
    for file_slice in slices[: start.file_index]:
        on_bytes_read(file_slice.size_bytes)
    for index in range(start.file_index, len(slices)):
        begin = start if index == start.file_index else Position(index)
        position = begin
        try:
            for block in _read_slice(slices[index], json_keys, begin, on_bytes_read, block_bytes):
                position = block.end
                yield block
        except BrokenArrayError as error:
            raise DataError(
                f"{slices[index].path}: file must be one JSON array or one JSON object a line, "
                f"got invalid JSON ({error}). Repair it."
            ) from error
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(
                f"{slices[index].path}:{position.num_records + 1}: file must be readable to its end, got: {cause}. "
                f"{explain_read_error(error)}"
            ) from error


def split_block(block: Block) -> Sequence[bytes | dict[str, Any]]:
    """Return the documents of a block, undecoded."""
    return [bytes(part) if isinstance(part, bytearray) else part for part in _split_payload(block)]


def decode_document(
    kind: BlockKind, payload: bytes | bytearray | dict[str, Any], json_keys: Sequence[str]
) -> Sequence[str]:
    """Return the text of each key of one document of `split_block`; raises BadRecordError if it has no such texts."""
    if isinstance(payload, dict):
        return select_texts(payload, json_keys)
    if kind is not BlockKind.TEXT:
        return decode_json_record(payload, json_keys)
    if len(json_keys) > 1:
        raise BadRecordError(f"plain text has one field, got {len(json_keys)} keys", "Pass one --json-keys")
    return [decode_utf8(payload)]


def decode_block(block: Block, json_keys: Sequence[str]) -> DecodedBlock:
    """Parse the documents of a block; a bad one is left out and described in `problems`."""
    payloads = _split_payload(block)
    if block.kind is BlockKind.LINES and len(json_keys) == 1:
        # None if one line is bad: then every line is decoded alone, to say which one.
        texts = decode_plain_lines(cast("Sequence[bytes]", payloads), json_keys[0])
        if texts is not None:
            return DecodedBlock((texts,), ())
    return _decode_one_by_one(block.kind, payloads, json_keys)


def _decode_one_by_one(
    kind: BlockKind, payloads: Sequence[bytes | bytearray | dict[str, Any]], json_keys: Sequence[str]
) -> DecodedBlock:
    columns: tuple[list[str], ...] = tuple([] for _ in json_keys)
    problems = []
    for place, payload in enumerate(payloads):
        try:
            texts = decode_document(kind, payload, json_keys)
        except BadRecordError as error:
            problems.append((place, str(error)))
            continue
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    return DecodedBlock(columns, tuple(problems))


def _split_payload(block: Block) -> Sequence[bytes | bytearray | dict[str, Any]]:
    if block.kind is BlockKind.ELEMENTS:
        return split_elements(block.payload)
    if block.kind is BlockKind.ROWS:
        return decode_parquet_rows(block.payload)
    is_one_line = block.payload.find(b"\n") in (-1, len(block.payload) - 1)
    if block.kind is BlockKind.TEXT or is_one_line:  # it may be very long, so it is not copied
        return [block.payload]
    # The payload ends with a line end, except at the end of a file that has none.
    lines = block.payload.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def count_records_before(file_slice: FileSlice) -> int:
    """Return how many documents of the file lie before the slice; reads what lies there."""
    if file_slice.is_whole:
        return 0
    if file_slice.path.name.lower().endswith(".parquet"):
        return _select_rows(file_slice, count_rows(file_slice.path))[0]
    num_lines = 0
    with open(file_slice.path, "rb") as file:
        # A line that begins before the slice belongs to the slice before, so its end is counted here too.
        left_bytes = find_first_line(file, file_slice.start)
        file.seek(0)
        while left_bytes > 0 and (chunk := file.read(min(READ_BUFFER_BYTES, left_bytes))):
            num_lines += chunk.count(b"\n")
            left_bytes -= len(chunk)
    return num_lines


def _select_rows(file_slice: FileSlice, num_rows: int) -> tuple[int, int]:
    """Return the first row of the slice and the row after its last, as if all rows of the file had the same size."""
    size_bytes = max(file_slice.path.stat().st_size, 1)
    # Both are rounded up: the end of a slice is the start of the next one, so no row is lost or read twice.
    return -(-file_slice.start * num_rows // size_bytes), -(-file_slice.end * num_rows // size_bytes)


def find_first_line(stream: BinaryIO, start: int) -> int:
    """Return where the first line begins that does not begin before `start`; moves the stream there."""
    if start == 0:
        stream.seek(0)
        return 0
    # One byte earlier: if that byte is a line end, a line begins exactly at `start` and belongs to this slice.
    stream.seek(start - 1)
    while (part := stream.readline(READ_BUFFER_BYTES)) and not part.endswith(b"\n"):
        pass
    return stream.tell()


def _read_slice(
    file_slice: FileSlice, json_keys: Sequence[str], begin: Position, on_bytes_read: OnBytesRead, block_bytes: int
) -> Iterator[Block]:
    path = file_slice.path
    if path.name.lower().endswith(".parquet"):
        yield from _read_rows(file_slice, json_keys, begin, on_bytes_read, block_bytes)
        return
    with open_decompressed(path, on_bytes_read) as stream:
        is_array = bare_name(path).endswith(".json") and starts_with_bracket(stream)
        if bare_name(path).endswith(".txt"):
            yield Block(BlockKind.TEXT, stream.read().removeprefix(UTF8_BOM), begin, Position(begin.file_index + 1))
            return
        # An offset of an archive counts decompressed bytes, and the decompression itself reports what it reads.
        if begin.offset:
            skip_to(stream, path, begin.offset)
            on_bytes_read(begin.offset - file_slice.start if not is_compressed(path) else 0)
        if is_array:
            yield from _read_elements(stream, begin, block_bytes)
        else:
            yield from _read_lines(stream, file_slice, begin, block_bytes)


def _read_lines(stream: BinaryIO, file_slice: FileSlice, begin: Position, block_bytes: int) -> Iterator[Block]:
    """A block is cut at a line end; the last line of a slice is the last that begins in it.

    A file that grows while it is read is read up to its size at the start.
    """
    end_offset = None if is_compressed(file_slice.path) else file_slice.end
    offset = begin.offset
    if not begin.num_records and file_slice.start:
        offset = find_first_line(stream, file_slice.start)
    num_records = begin.num_records
    position = Position(begin.file_index, offset, num_records)
    pending = bytearray()
    while (end_offset is None or offset < end_offset) and (lines := _read_whole_lines(stream, block_bytes, pending)):
        # The last line begins before the end of the slice, so it ends at the first line end from `end_offset - 1` on.
        # The last line of a file may have no line end: then find() gives -1, and all of it is kept.
        if end_offset is not None and offset + len(lines) >= end_offset:
            del lines[lines.find(b"\n", end_offset - 1 - offset) + 1 or len(lines) :]
        offset += len(lines)
        num_records += lines.count(b"\n") + (not lines.endswith(b"\n"))
        behind = Position(begin.file_index, offset, num_records)
        # After the offsets are computed: they count the bytes of the file, and the byte order mark is one of its parts.
        if position.offset == 0 and lines.startswith(UTF8_BOM):
            del lines[: len(UTF8_BOM)]
        yield Block(BlockKind.LINES, lines, position, behind)
        position = behind
        del lines  # frees a long line before the next one is read


def _read_whole_lines(stream: BinaryIO, block_bytes: int, pending: bytearray) -> bytearray:
    """Return at least one line, whole, and as many as about `block_bytes` hold; `pending` keeps a line's beginning."""
    lines = bytearray(pending)
    pending.clear()
    while chunk := stream.read(block_bytes):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            lines += memoryview(chunk)[:cut]
            pending += memoryview(chunk)[cut:]
            break
        lines += chunk
    return lines


def _read_elements(stream: BinaryIO, begin: Position, block_bytes: int) -> Iterator[Block]:
    offset = begin.offset
    if offset == 0:
        while stream.read(1) != b"[":  # `starts_with_bracket` has seen it
            offset += 1
        offset += 1
    position = Position(begin.file_index, offset, begin.num_records)
    for run in cut_elements(stream, block_bytes, is_first=begin.num_records == 0):
        behind = Position(begin.file_index + 1)  # a later run cannot continue at the bracket that ends the array
        if run.end is not None:
            behind = Position(begin.file_index, offset + run.end, position.num_records + run.num_elements)
        yield Block(BlockKind.ELEMENTS, run.payload, position, behind)
        position = behind


def _read_rows(
    file_slice: FileSlice, json_keys: Sequence[str], begin: Position, on_bytes_read: OnBytesRead, block_bytes: int
) -> Iterator[Block]:
    num_rows = count_rows(file_slice.path)
    first_row, end_row = _select_rows(file_slice, num_rows)
    row = max(first_row, begin.offset)
    # Only some columns are read, so the bytes read do not add up to the size of the file. Progress counts rows instead.
    bytes_per_row = file_slice.size_bytes / max(end_row - first_row, 1)
    on_bytes_read(round(bytes_per_row * (row - first_row)))
    position = Position(begin.file_index, row, row - first_row)
    for batch in read_row_batches(file_slice.path, json_keys, block_bytes, first_row=row, end_row=end_row):
        behind = Position(begin.file_index, batch.end, batch.end - first_row)
        on_bytes_read(round(bytes_per_row * (behind.offset - position.offset)))
        yield Block(BlockKind.ROWS, batch.payload, position, behind)
        position = behind
