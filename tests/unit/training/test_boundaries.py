"""Boundaries in every form, against loops over conversations."""

import itertools

import pytest
import torch

from megatron_hammer.training.boundaries import Boundaries, select_on_cp_rank
from tests.helpers.te_stand_in_attention import list_places_by_rank

SIZE = 16
# Ends of conversations in three sequences: with padding, full, and one conversation alone.
ENDS = ([4, 8, 12], [8, 16], [12])


def build(ends: tuple[list[int], ...] = ENDS) -> Boundaries:
    rows = [[0, *row, *[row[-1]] * (SIZE - len(row))] for row in ends]
    return Boundaries(torch.tensor(rows, dtype=torch.int32), SIZE)


def list_spans(row: list[int]) -> list[tuple[int, int]]:
    """Conversations and the padding, if any."""
    return [span for span in itertools.pairwise([0, *row, SIZE]) if span[0] < span[1]]


def test_positions_begin_with_each_conversation() -> None:
    expected = [[place - start for start, end in list_spans(row) for place in range(start, end)] for row in ENDS]
    assert build().build_positions().tolist() == expected


def test_attention_is_confined() -> None:
    mask = build().build_mask()
    assert mask.shape == (len(ENDS), 1, SIZE, SIZE)
    for number, row in enumerate(ENDS):
        for query, key in itertools.product(range(SIZE), repeat=2):
            is_seen = any(start <= key <= query < end for start, end in list_spans(row))
            assert mask[number, 0, query, key].item() is not is_seen


def test_sequences_one_after_another() -> None:
    params = build().build_packed_params()
    expected = [0] + [number * SIZE + end for number, row in enumerate(ENDS) for _, end in list_spans(row)]
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == expected
    assert params.cu_seqlens_q.dtype == torch.int32
    assert params.qkv_format == "sbhd"  # model/te_attention.py changes it, megatron must not
    assert params.max_seqlen_q == params.max_seqlen_kv == SIZE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_context_parallel_rank_has_two_parts_of_each_conversation(rank: int) -> None:
    boundaries = build()
    batch = {"tokens": torch.arange(len(ENDS) * SIZE).view(len(ENDS), SIZE), "labels": None, "loss_mask": None}
    batch["position_ids"] = boundaries.build_positions()
    mine = select_on_cp_rank(batch, boundaries, cp_size=2, cp_rank=rank)
    # Where TransformerEngine expects them: the sequences of the micro-batch one after another.
    places = list_places_by_rank(boundaries.build_packed_params().cu_seqlens_q, 2).view(2, -1)
    assert mine["tokens"].flatten().tolist() == places[rank].tolist()
    assert torch.equal(mine["position_ids"], batch["position_ids"].flatten()[mine["tokens"]])
    assert mine["labels"] is None
