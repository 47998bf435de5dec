"""How many rows the conversations of a source fill, and what they hold; read from the lengths, and from the masks."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.data.conversations.packing import MIN_CONVERSATION_TOKENS, RowLayout, plan_rows
from megatron_hammer.data.conversations.pair import Conversations, mask_prefix
from megatron_hammer.data.indexed.documents import bound_memory
from megatron_hammer.data.indexed.pair import idx_path, read_index
from megatron_hammer.files.read import is_present

CHUNK_TOKENS = 1 << 24  # of masks that are looked at together: 128 MiB of sums


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Of one split of a source, in one epoch. num_positions: that conversations take; the rest of the rows is padding.

    num_too_long: conversations that a row cannot hold. num_too_short: without a token to learn after the first.
    """

    num_conversations: int
    num_rows: int
    num_positions: int
    num_too_long: int
    longest_tokens: int
    num_too_short: int


def count_rows(prefix: str, bounds: tuple[float, float], layout: RowLayout) -> RowCounts:
    """The rows of a split, cut where megatron-core cuts it; bounds: shares of the conversations.

    Raises DataError as `read_index` does.
    """
    return _count_rows(prefix, bounds, layout, idx_path(prefix).stat().st_mtime_ns if idx_path(prefix).exists() else 0)


@functools.lru_cache(maxsize=64)
def _count_rows(prefix: str, bounds: tuple[float, float], layout: RowLayout, mtime_ns: int) -> RowCounts:
    """mtime_ns: so that a file that was written anew is read again."""
    index = read_index(prefix)
    first, last = (round(bound * float(index.num_sequences)) for bound in bounds)
    lengths = np.asarray(index.sequence_lengths[first:last])
    is_short = lengths < MIN_CONVERSATION_TOKENS
    plan = plan_rows(np.maximum(lengths, MIN_CONVERSATION_TOKENS), layout)
    return RowCounts(
        num_conversations=len(lengths),
        num_rows=plan.num_rows,
        num_positions=plan.num_positions,
        num_too_long=int(layout.is_too_long(lengths).sum()),
        longest_tokens=int(lengths.max()) if len(lengths) else 0,
        num_too_short=int(is_short.sum()),
    )


def has_masks(prefix: str) -> bool:
    """Whether a pair holds conversations, by the masks beside it."""
    return is_present(idx_path(mask_prefix(Path(prefix))))


def find_unlearned(conversations: Conversations, *, seq_length: int | None = None) -> np.ndarray:
    """The conversations with nothing to learn; reads all masks.

    seq_length: of each conversation only the first positions, as many as a row has, and their labels.
    """
    offsets = conversations.read_offsets()
    found = []
    for start, stop in bound_memory(np.diff(offsets), CHUNK_TOKENS):
        first = int(offsets[start])
        _, mask = conversations.select(first, int(offsets[stop]))
        learned = np.concatenate(([0], np.cumsum(mask != 0)))
        starts, ends = offsets[start:stop] - first, offsets[start + 1 : stop + 1] - first
        if seq_length is not None:
            ends = np.minimum(ends, starts + seq_length + 1)
        # The first token is no position's label, so it cannot be learned.
        found.append(start + np.flatnonzero(learned[ends] == learned[np.minimum(starts + 1, ends)]))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
