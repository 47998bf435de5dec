"""Documents from files: .jsonl, .json, .txt, each plain or as .gz or .zst, and .parquet; files, globs, directories.

Use `read_documents` to take one text after another. To read many at once, in other processes, or from where an earlier
run stopped, use the blocks of corpus/blocks.py, on which this module is built. A record that cannot be decoded is a
DataError naming file:line, never a skipped line.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.corpus.blocks import BlockKind, decode_document, read_blocks, select_whole_files, split_block
from megatron_hammer.corpus.byte_streams import OnBytesRead
from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.corpus.json_records import BadRecordError
from megatron_hammer.errors import DataError

__all__ = ["Document", "Record", "decode_record", "find_input_files", "read_documents", "read_records"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from: `line` counts from 1 (a row in parquet, an element in a JSON array)."""

    text: str
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Record:
    """One document before decoding; `payload` is JSON text, a row that is already parsed, or plain UTF-8 text."""

    source: str
    line: int
    payload: bytes | dict[str, Any]
    kind: BlockKind


def read_documents(
    inputs: Sequence[str | Path], json_key: str = "text", on_bytes_read: OnBytesRead = lambda num_bytes: None
) -> Iterator[Document]:
    """Yield every document of the inputs, in order; `json_key` is the field or column that holds the text.

    on_bytes_read: called with the size on disk of each chunk that is read. Raises DataError at the first record that is
    not a document, naming file:line.
    """
    for record in read_records(find_input_files(inputs).files, (json_key,), on_bytes_read):
        (text,) = decode_record(record, (json_key,))
        yield Document(text, record.source, record.line)


def read_records(
    files: Iterable[Path], json_keys: Sequence[str], on_bytes_read: OnBytesRead = lambda num_bytes: None
) -> Iterator[Record]:
    """Yield the undecoded records of the files; `on_bytes_read` is told of each chunk's size on disk as it is read.

    json_keys: the fields that `decode_record` will ask for; of a Parquet file no other column is read.
    Raises DataError if a file cannot be read to its end: a broken or truncated archive, an unreadable file.
    """
    slices = select_whole_files(tuple(files))
    for block in read_blocks(slices, json_keys, on_bytes_read=on_bytes_read):
        source = str(slices[block.begin.file_index].path)
        for line, payload in enumerate(split_block(block), start=block.begin.num_records + 1):
            yield Record(source, line, payload, block.kind)


def decode_record(record: Record, json_keys: Sequence[str]) -> tuple[str, ...]:
    """Return the text of each key; raises DataError naming file:line if the record has no such texts."""
    try:
        return tuple(decode_document(record.kind, record.payload, json_keys))
    except BadRecordError as error:
        raise DataError(f"{record.source}:{record.line}: {error}") from error
