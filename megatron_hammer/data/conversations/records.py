"""The records of files of conversations, one after another, each with its place: what looks at them outside a pool."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from megatron_hammer.corpus.blocks import read_blocks, select_whole_files, split_block
from megatron_hammer.corpus.input_files import find_input_files
from megatron_hammer.data.conversations.formats import Fields, parse_record

# A column that no file has: then the Parquet reader gives all columns, since the format is not known yet.
ALL_COLUMNS = ("*",)


def iterate_records(inputs: Sequence[str]) -> Iterator[tuple[str, Callable[[], Fields]]]:
    """Yield `file:line` of every record, and what returns its fields or raises ConversationError.

    inputs: files, globs or directories. Raises DataError for those that cannot be read.
    """
    slices = select_whole_files(find_input_files(inputs).files)
    for block in read_blocks(slices, ALL_COLUMNS):
        path = slices[block.begin.file_index].path
        for line, payload in enumerate(split_block(block), start=block.begin.num_records + 1):
            yield f"{path}:{line}", partial(parse_record, block.kind, payload)
