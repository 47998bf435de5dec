"""Conversations as rows of seq_length positions for Megatron's loop: tokens, labels, where learning counts, boundaries.

Megatron's SFTDataset tokenizes JSON lines as it trains, cuts what is too long in silence, and leaves the boundaries of
conversations to the first and last pipeline stage. Here tokens and masks are read from the stored format, `packing.py`
chooses the rows, and every stage gets the boundaries (training/forward_step.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_hammer.data.conversations.packing import RowLayout, plan_rows
from megatron_hammer.data.conversations.pair import Conversations, open_conversations
from megatron_hammer.errors import DataError

PADDING_ID = 0  # any token: no conversation attends to padding, and no loss is taken there


@dataclass
class ConversationDatasetConfig(BlendedMegatronDatasetConfig):
    """mcore's configuration, and how conversations become rows; see `RowLayout`."""

    is_packed: bool = True
    is_truncated: bool = False
    granularity: int = 1

    @property
    def rows(self) -> RowLayout:
        return RowLayout(
            seq_length=self.sequence_length,
            is_packed=self.is_packed,
            is_truncated=self.is_truncated,
            granularity=self.granularity,
        )


class ConversationDataset(MegatronDataset):
    """Rows of one source; sample i is row i % num_rows of epoch i // num_rows."""

    def __init__(
        self,
        dataset: Conversations,
        dataset_path: str,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: ConversationDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.layout = config.rows
        lengths = dataset.lengths[indices]
        if not self.layout.is_truncated and self.layout.is_too_long(lengths).any():
            raise DataError(
                f"{dataset_path}: conversations must fit into seq_length + 1 = {self.layout.seq_length + 1} tokens, "
                f"got one of {lengths.max()}. Raise --seq-length, or pass --sft-truncate."
            )
        self.plan = plan_rows(lengths, self.layout)
        self.offsets = dataset.read_offsets()

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Conversations) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: ConversationDatasetConfig) -> Conversations:
        return open_conversations(dataset_path)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Part of the description whose hash names the cache of a blend.
        return [*MegatronDataset._key_config_attributes(), "is_packed", "is_truncated", "granularity"]

    def __len__(self) -> int:
        """As many samples as were asked for; one epoch where Megatron reads a set whole."""
        return self.plan.num_rows if self.num_samples is None else self.num_samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        chosen = self.plan.select(self.config.random_seed, int(sample))
        numbers = self.indices[chosen]
        bounds = zip(self.offsets[numbers].tolist(), self.offsets[numbers + 1].tolist(), strict=True)
        return build_row([self.dataset.select(start, stop) for start, stop in bounds], self.layout)


def build_row(conversations: list[tuple[np.ndarray, np.ndarray]], layout: RowLayout) -> dict[str, torch.Tensor]:
    """One row of (tokens, loss mask) of conversations.

    tokens, labels, position_ids [s] int64, loss_mask [s] fp32: position i of a conversation has its token i, the label
    i + 1, and counts where that label is learned. cu_seqlens [s + 1] int32: 0 and where each conversation ends, the
    last end repeated, without padding; cu_seqlens_padded: the same with the padding that context parallelism needs
    after each conversation. Positions after the last end are padding. max_seqlen: of the longest conversation.
    """
    size = layout.seq_length
    tokens, labels = (np.full(size, PADDING_ID, dtype=np.int64) for _ in range(2))
    loss_mask, positions = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int64)
    lengths = np.array([len(ids) for ids, _ in conversations])
    padded_ends = np.cumsum(layout.count_positions(lengths))
    counts = np.minimum(lengths - 1, size)
    start = 0
    for (ids, mask), count, end in zip(conversations, counts.tolist(), padded_ends.tolist(), strict=True):
        tokens[start : start + count] = ids[:count]
        labels[start : start + count] = ids[1 : count + 1]
        loss_mask[start : start + count] = mask[1 : count + 1] != 0
        positions[start:end] = np.arange(end - start)
        start = end
    positions[start:] = np.arange(size - start)
    row = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": positions,
        "cu_seqlens": _write_ends(np.cumsum(counts), size),
        "max_seqlen": np.array(np.diff(padded_ends, prepend=0).max(), dtype=np.int32),
    }
    if layout.granularity > 1:
        row["cu_seqlens_padded"] = _write_ends(padded_ends, size)
    return {name: torch.from_numpy(array) for name, array in row.items()}


def _write_ends(ends: np.ndarray, size: int) -> np.ndarray:
    """[size + 1] int32: one length for every row, so that rows can be stacked."""
    written = np.full(size + 1, ends[-1], dtype=np.int32)
    written[0], written[1 : len(ends) + 1] = 0, ends
    return written
