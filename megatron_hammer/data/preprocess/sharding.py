"""Which part of the input each of several runs reads; the parts in order are the whole input.

Shard i of n owns the documents that begin in bytes S*i/n up to S*(i+1)/n of the S bytes of all input files taken
together. Plain lines and Parquet rows are cut there; archives, JSON arrays and .txt files belong whole to the shard in
which they begin.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.corpus.blocks import FileSlice, is_cuttable, select_whole_files
from megatron_hammer.data.indexed.manifest import JobShard
from megatron_hammer.errors import ConfigError


def parse_shard(text: str) -> JobShard:
    """Read `I/N`; raises ConfigError unless 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"shard: must be I/N with I from 0 to N - 1, got {text}. Pass 0/4, 1/4, 2/4 and 3/4 to four runs."
        )
    return JobShard(int(match[1]), int(match[2]))


def select_shard_prefix(output_prefix: Path, shard: JobShard | None) -> Path:
    """Return the prefix of one shard's outputs, by which they sort in the order of the input."""
    # Zeros in front, so that names sort as numbers do.
    return output_prefix if shard is None else Path(f"{output_prefix}-{shard.index:05d}-of-{shard.count:05d}")


def select_slices(files: Sequence[Path], shard: JobShard | None) -> tuple[FileSlice, ...]:
    """Return what the shard reads of each file that it reads from; everything without a shard."""
    whole = select_whole_files(files)
    if shard is None:
        return whole
    total_bytes = sum(part.end for part in whole)
    # Integers of any size: every byte belongs to exactly one shard, whatever the rounding.
    begin, end = (total_bytes * number // shard.count for number in (shard.index, shard.index + 1))
    slices = []
    offset = 0
    for part in whole:
        first, last = max(begin - offset, 0), min(end - offset, part.end)
        # An empty last file begins at the very end; it is listed by the last shard.
        begins_here = begin <= offset < end or (offset == total_bytes and shard.index == shard.count - 1)
        if part.end > 0 and (begins_here or first < last) and is_cuttable(part.path):
            slices.append(FileSlice(part.path, first, last, is_whole=(first, last) == (0, part.end)))
        elif begins_here:
            slices.append(part)
        offset += part.end
    return tuple(slices)
