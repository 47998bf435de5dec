"""What a row holds, read off conversations that are written by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split

from megatron_hammer.data.conversations.dataset import ConversationDataset, ConversationDatasetConfig, build_row
from megatron_hammer.data.conversations.packing import RowLayout
from megatron_hammer.errors import DataError
from tests.helpers.toy_conversations import draw_conversations, write_conversations

CONVERSATIONS = [
    (np.array([11, 12, 13, 14]), np.array([1, 0, 1, 1])),
    (np.array([21, 22]), np.array([0, 1])),
    (np.array([31, 32, 33]), np.array([0, 0, 1])),
]


def read(row: dict[str, torch.Tensor], name: str) -> list[int]:
    return row[name].int().tolist()


def test_a_packed_row() -> None:
    row = build_row(CONVERSATIONS, RowLayout(seq_length=8, is_packed=True, is_truncated=False))
    assert read(row, "tokens") == [11, 12, 13, 21, 31, 32, 0, 0]
    assert read(row, "labels") == [12, 13, 14, 22, 32, 33, 0, 0]
    assert read(row, "loss_mask") == [0, 1, 1, 1, 0, 1, 0, 0]  # that of the label, not of the token
    assert read(row, "position_ids") == [0, 1, 2, 0, 0, 1, 0, 1]
    assert read(row, "cu_seqlens") == [0, 3, 4, 6, 6, 6, 6, 6, 6]
    assert row["max_seqlen"].item() == 3
    types = {name: tensor.dtype for name, tensor in row.items()}
    assert types["tokens"] == types["labels"] == types["position_ids"] == torch.int64
    assert types["cu_seqlens"] == types["max_seqlen"] == torch.int32


def test_a_row_for_context_parallelism_has_padding_after_each_conversation() -> None:
    row = build_row(CONVERSATIONS, RowLayout(seq_length=16, is_packed=True, is_truncated=False, granularity=4))
    assert read(row, "tokens") == [11, 12, 13, 0, 21, 0, 0, 0, 31, 32, 0, 0, 0, 0, 0, 0]
    assert read(row, "loss_mask") == [0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert read(row, "position_ids") == [0, 1, 2, 3] * 4
    assert read(row, "cu_seqlens")[:5] == [0, 3, 4, 6, 6]  # without padding
    assert read(row, "cu_seqlens_padded")[:5] == [0, 4, 8, 12, 12]


def test_a_long_conversation_is_cut_at_its_end() -> None:
    row = build_row(CONVERSATIONS[:1], RowLayout(seq_length=2, is_packed=True, is_truncated=True))
    assert read(row, "tokens") == [11, 12]
    assert read(row, "labels") == [12, 13]
    assert read(row, "cu_seqlens") == [0, 2, 2]


def build(prefix: str, *, num_samples: int | None, size: int, indices: np.ndarray) -> ConversationDataset:
    config = ConversationDatasetConfig(random_seed=3, sequence_length=size, blend=([prefix], None), split="100,0,0")
    stored = ConversationDataset.build_low_level_dataset(prefix, config)
    return ConversationDataset(stored, prefix, indices, num_samples, Split.train, config)


def test_samples_come_from_the_files(tmp_path: Path) -> None:
    conversations = draw_conversations(30, vocab_size=500, longest=17)
    prefix = write_conversations(tmp_path / "c", conversations, vocab_size=500)
    data = build(prefix, num_samples=100, size=16, indices=np.arange(10, 30))
    assert len(data) == 100  # more than an epoch
    assert len(build(prefix, num_samples=None, size=16, indices=np.arange(10, 30))) == data.plan.num_rows
    rows = [data[number] for number in range(data.plan.num_rows)]
    found = sorted(
        tuple(row["tokens"][start:end].tolist())
        for row in rows
        for start, end in zip(*(row["cu_seqlens"].unique().tolist()[a:b] for a, b in ((0, -1), (1, None))), strict=True)
    )
    assert found == sorted(tuple(ids[:-1].tolist()) for ids, _ in conversations[10:])
    assert sum(row["loss_mask"].sum() for row in rows) == sum(mask[1:].sum() for _, mask in conversations[10:])


def test_a_conversation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    prefix = write_conversations(tmp_path / "c", CONVERSATIONS, vocab_size=500)
    with pytest.raises(DataError, match=r"must fit into seq_length \+ 1 = 3 tokens, got one of 4.*--sft-truncate"):
        build(prefix, num_samples=1, size=2, indices=np.arange(3))
