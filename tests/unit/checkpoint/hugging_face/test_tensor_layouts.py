"""Each pair is exact in both directions; the order of the rows is written out by hand, and a wrong one is noticed."""

import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.tensor_layouts import (
    merge_gate_up,
    merge_qkv,
    split_gate_up,
    split_qkv,
)
from megatron_hammer.errors import ConversionError

GROUPS, HEADS_PER_GROUP, HEAD_DIM, HIDDEN = 2, 3, 4, 7
ROWS = GROUPS * (HEADS_PER_GROUP + 2) * HEAD_DIM


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).reshape(shape)


@pytest.mark.parametrize("shape", [(ROWS, HIDDEN), (ROWS,)], ids=["weight", "bias"])
def test_qkv_there_and_back(shape):
    qkv = numbered(*shape)
    parts = split_qkv(qkv, num_query_groups=GROUPS, head_dim=HEAD_DIM)
    assert [part.shape[0] for part in parts] == [24, 8, 8]
    assert all(part.is_contiguous() and part.dtype == qkv.dtype for part in parts)
    assert torch.equal(merge_qkv(*parts, num_query_groups=GROUPS, head_dim=HEAD_DIM), qkv)


def test_qkv_rows_stand_group_by_group():
    rows = torch.arange(ROWS)
    query, key, value = split_qkv(rows, num_query_groups=GROUPS, head_dim=HEAD_DIM)
    assert query.tolist() == [*range(0, 12), *range(20, 32)]
    assert key.tolist() == [*range(12, 16), *range(32, 36)]
    assert value.tolist() == [*range(16, 20), *range(36, 40)]


def test_no_row_is_copied_that_stands_where_it_should():
    """An export reads mapped files: what is only cut stays a view of them."""
    one_group, gate_up = numbered(ROWS, HIDDEN), numbered(10, HIDDEN)
    parts = split_qkv(one_group, num_query_groups=1, head_dim=HEAD_DIM)
    assert all(part.untyped_storage().data_ptr() == one_group.untyped_storage().data_ptr() for part in parts)
    parts = split_gate_up(gate_up)
    assert all(part.untyped_storage().data_ptr() == gate_up.untyped_storage().data_ptr() for part in parts)
    assert all(part.is_contiguous() for part in parts)


@pytest.mark.parametrize(
    "wrong", [{"num_query_groups": 4, "head_dim": 2}, {"num_query_groups": 1, "head_dim": 4}], ids=["groups", "one"]
)
def test_twin_wrong_groups_do_not_come_back(wrong):
    qkv = numbered(ROWS, HIDDEN)
    query, key, value = split_qkv(qkv, num_query_groups=GROUPS, head_dim=HEAD_DIM)
    try:
        merged = merge_qkv(query, key, value, **wrong)
    except ConversionError:
        return
    assert not torch.equal(merged, qkv)


def test_twin_exchanged_key_and_value_do_not_come_back():
    qkv = numbered(ROWS, HIDDEN)
    query, key, value = split_qkv(qkv, num_query_groups=GROUPS, head_dim=HEAD_DIM)
    assert not torch.equal(merge_qkv(query, value, key, num_query_groups=GROUPS, head_dim=HEAD_DIM), qkv)


@pytest.mark.parametrize("rows", [41, 16], ids=["not whole heads", "no query"])
def test_qkv_of_impossible_rows_is_refused(rows):
    with pytest.raises(ConversionError, match=rf"rows={rows}, num_query_groups \* head_dim=8\b"):
        split_qkv(torch.empty(rows, HIDDEN), num_query_groups=GROUPS, head_dim=HEAD_DIM)


def test_qkv_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConversionError, match=r"q=24, k=8, v=12\b"):
        merge_qkv(numbered(24), numbered(8), numbered(12), num_query_groups=GROUPS, head_dim=HEAD_DIM)


@pytest.mark.parametrize("shape", [(10, HIDDEN), (10,)], ids=["weight", "bias"])
def test_gate_up_there_and_back(shape):
    gate_up = numbered(*shape)
    gate, up = split_gate_up(gate_up)
    assert torch.equal(gate, gate_up[:5])
    assert torch.equal(merge_gate_up(gate, up), gate_up)
    assert not torch.equal(merge_gate_up(up, gate), gate_up)  # the twin


def test_gate_up_that_do_not_fit_are_refused():
    with pytest.raises(ConversionError, match=r"rows=11\b"):
        split_gate_up(numbered(11, HIDDEN))
    with pytest.raises(ConversionError, match=r"gate=\(5, 7\), up=\(6, 7\)"):
        merge_gate_up(numbered(5, HIDDEN), numbered(6, HIDDEN))
