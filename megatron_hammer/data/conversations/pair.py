"""Conversations as they are stored: token ids, and for each token whether it is learned.

`PREFIX.bin/.idx` holds the ids and `PREFIX_loss_mask.bin/.idx` one uint8 for each of them: 1 where this token is
learned as a target, 0 elsewhere. Both are Megatron's indexed format (data/indexed/index_format.py) with one document
of one sequence per conversation, and the same lengths. The mask belongs to the token itself and is not shifted: the
loss of position i, whose target is token i + 1, counts where mask[i + 1] is 1. manifest.py describes
`PREFIX.manifest.json`. Not here: rendering and encoding (post_training/), packing for training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megatron_hammer.data.conversations.manifest import ConversationManifest, mask_prefix, read_conversation_manifest
from megatron_hammer.data.indexed.manifest import encode_manifest, manifest_path
from megatron_hammer.data.indexed.pair import IndexedWriter, IndexSummary, bin_path, idx_path, read_index
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import partial_path, publish_files

__all__ = ["MASK_DTYPE", "ConversationWriter", "Conversations", "mask_prefix", "open_conversations"]

MASK_DTYPE = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Conversations:
    """Stored conversations; token arrays are mapped from the files, so opening costs nothing that grows with them."""

    ids: IndexSummary
    masks: IndexSummary
    manifest: ConversationManifest

    def __len__(self) -> int:
        return self.ids.num_documents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation: [num_conversations] int32."""
        return self.ids.sequence_lengths

    def read_offsets(self) -> np.ndarray:
        """Where each conversation starts in the tokens, and the end of the last: [num_conversations + 1] int64."""
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def select(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, uint8, of a range of tokens; `read_offsets` says where conversations lie."""
        return self.ids.tokens[start:stop], self.masks.tokens[start:stop]


def open_conversations(prefix: str | Path) -> Conversations:
    """Open stored conversations.

    Raises DataError if a file is missing or damaged, if masks and ids have other lengths, or if a conversation is not
    one sequence.
    """
    manifest = read_conversation_manifest(prefix)
    ids, masks = read_index(prefix), read_index(mask_prefix(prefix))
    remedy = "Write the conversations again with hammer preprocess-conversations."
    if masks.dtype != MASK_DTYPE:
        raise DataError(f"{masks.bin_path}: masks must be uint8, got {masks.dtype}. {remedy}")
    if not np.array_equal(ids.sequence_lengths, masks.sequence_lengths):
        raise DataError(
            f"{masks.idx_path}: masks must have the lengths of the conversations, got {masks.num_tokens:,} entries in "
            f"{masks.num_sequences:,} for {ids.num_tokens:,} tokens in {ids.num_sequences:,}. {remedy}"
        )
    # A document index that counts from 0 by one: conversation i is sequence i.
    for index in (ids, masks):
        if not np.array_equal(index.document_index, np.arange(index.num_sequences + 1)):
            raise DataError(f"{index.idx_path}: each conversation must be one sequence, got another index. {remedy}")
    return Conversations(ids, masks, manifest)


class ConversationWriter:
    """Write conversations as a stream, in constant memory; nothing has its name before `publish`.

    As a context manager it removes what it wrote unless `publish` was called. Raises OutputError if the files cannot
    be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        """dtype: of the ids, from `select_dtype`."""
        self.prefix = Path(prefix)
        self.num_learned_tokens = 0
        self._ids = IndexedWriter(prefix, dtype)
        try:
            self._masks = IndexedWriter(mask_prefix(prefix), MASK_DTYPE)
        except BaseException:
            self._ids.abort()
            raise

    @property
    def dtype(self) -> np.dtype:
        return self._ids.dtype

    @property
    def num_conversations(self) -> int:
        return self._ids.num_documents

    @property
    def num_tokens(self) -> int:
        return self._ids.num_tokens

    def add(self, ids: np.ndarray, mask: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Add conversations, one after another: ids and mask [sum of lengths], mask of 0 and 1, lengths above 0."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if len(ids) != len(mask) or (len(lengths) and lengths.min() < 1) or (len(mask) and int(mask.max()) > 1):
            raise ValueError(f"need as many masks of 0 and 1 as ids, and no empty conversation: {len(ids)} {len(mask)}")
        self._ids.add_documents(ids, lengths)
        self._masks.add_documents(mask, lengths)
        self.num_learned_tokens += int(mask.sum(dtype=np.int64))

    def finish(self) -> list[Path]:
        """Complete both pairs under their .partial names; returns .bin and .idx of the ids, then of the masks."""
        self._ids.finish()
        self._masks.finish()
        prefixes = (self.prefix, mask_prefix(self.prefix))
        return [partial_path(path(prefix)) for prefix in prefixes for path in (bin_path, idx_path)]

    def publish(self, manifest: ConversationManifest) -> None:
        """Give everything its name; call `finish` before.

        The old .idx goes first and the new one comes last, so a crash at any point leaves nothing that opens with the
        masks or the manifest of other conversations.
        """
        idx_path(self.prefix).unlink(missing_ok=True)
        publish_files({manifest_path(self.prefix): encode_manifest(manifest)})
        self._masks.publish()
        self._ids.publish()

    def abort(self) -> None:
        """Remove what was written under .partial names; does nothing after `publish`."""
        self._ids.abort()
        self._masks.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
