"""What a source's conversations fill, and which of them teach nothing."""

from pathlib import Path

import numpy as np

from megatron_hammer.data.conversations import counts
from megatron_hammer.data.conversations.counts import count_rows, find_unlearned, has_masks
from megatron_hammer.data.conversations.packing import RowLayout
from megatron_hammer.data.conversations.pair import open_conversations
from tests.helpers.toy_conversations import write_conversations

MASKS = [[0, 1], [1, 0, 0], [0, 0, 0, 1], [0, 0], [0, 1, 0, 0]]
CONVERSATIONS = [(np.arange(1, len(mask) + 1), np.array(mask, dtype=np.uint8)) for mask in MASKS]


def test_rows_of_a_split(tmp_path: Path) -> None:
    prefix = write_conversations(tmp_path / "c", CONVERSATIONS, vocab_size=9)
    layout = RowLayout(seq_length=3, is_packed=True, is_truncated=False)
    whole = count_rows(prefix, (0.0, 1.0), layout)
    assert (whole.num_conversations, whole.num_rows, whole.num_positions) == (5, 4, 10)
    assert (whole.num_too_long, whole.longest_tokens) == (0, 4)
    half = count_rows(prefix, (0.0, 0.4), layout)
    assert (half.num_conversations, half.num_rows) == (2, 1)
    short = count_rows(prefix, (0.0, 1.0), RowLayout(seq_length=2, is_packed=True, is_truncated=False))
    assert short.num_too_long == 2


def test_conversations_without_a_token_to_learn(tmp_path: Path, monkeypatch) -> None:
    prefix = write_conversations(tmp_path / "c", CONVERSATIONS, vocab_size=9)
    assert has_masks(prefix)
    assert not has_masks(f"{prefix}_loss_mask")
    stored = open_conversations(prefix)
    assert find_unlearned(stored).tolist() == [1, 3]  # the first token is no label
    assert find_unlearned(stored, seq_length=2).tolist() == [1, 2, 3]
    monkeypatch.setattr(counts, "CHUNK_TOKENS", 5)
    assert find_unlearned(stored).tolist() == [1, 3]
