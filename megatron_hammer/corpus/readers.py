"""Documents from files: .jsonl, .json, .txt, each plain or as .gz or .zst, and .parquet; files, globs, directories.

Use `read_documents` to take one text after another. To read many at once, in other processes, or from where an earlier
run stopped, use the blocks of corpus/blocks.py, on which this module is built. A record that cannot be decoded is a
DataError naming file:line, never a skipped line.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.corpus.blocks import Block, decode_document, read_blocks, select_whole_files, split_block
from megatron_hammer.corpus.byte_streams import OnBytesRead
from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.corpus.json_records import BadRecordError
from megatron_hammer.errors import DataError

# Enough texts for a tokenizer to work on at once, and little beside the memory of the tokenizer itself.
BATCH_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from: `line` counts from 1 (a row in parquet, an element in a JSON array)."""

    text: str
    source: str
    line: int


def read_documents(
    inputs: Sequence[str | Path], json_key: str = "text", on_bytes_read: OnBytesRead = lambda num_bytes: None
) -> Iterator[Document]:
    """Yield every document of the inputs, in order; `json_key` is the field or column that holds the text.

    on_bytes_read: called with the size on disk of each chunk that is read. Raises DataError at the first record that is
    not a document, naming file:line, and for a file that cannot be read to its end.
    """
    yield from read_files(find_input_files(inputs).files, json_key, on_bytes_read)


def read_files(
    files: Sequence[Path], json_key: str = "text", on_bytes_read: OnBytesRead = lambda num_bytes: None
) -> Iterator[Document]:
    """Yield every document of files that `find_input_files` has found; see `read_documents`."""
    slices = select_whole_files(files)
    for block in read_blocks(slices, (json_key,), on_bytes_read=on_bytes_read):
        for _, document in decode_documents(block, str(slices[block.begin.file_index].path), json_key):
            yield document


def decode_documents(block: Block, source: str, json_key: str) -> Iterator[tuple[bytes | dict[str, Any], Document]]:
    """Yield every record of a block as it was read, with its document; source: the block's file.

    Raises DataError naming file:line at the first record that is not a document.
    """
    for line, payload in enumerate(split_block(block), start=block.begin.num_records + 1):
        try:
            # Undecoded records come with their documents, because deduplication writes the kept ones unchanged.
            (text,) = decode_document(block.kind, payload, (json_key,))
        except BadRecordError as error:
            raise DataError(f"{source}:{line}: {error}") from error
        yield payload, Document(text, source, line)


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists of about BATCH_CHARS characters."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text) + 1  # so that empty documents too end a batch
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
