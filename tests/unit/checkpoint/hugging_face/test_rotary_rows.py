"""The order of q's and k's rows is written out by hand, is undone exactly, and a wrong one is noticed."""

import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.rotary_rows import permute_rope, unpermute_rope
from megatron_hammer.errors import ConversionError

HEADS, HEAD_DIM, HIDDEN = 3, 6, 5


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.bfloat16).reshape(shape)


def test_the_halves_of_a_head_stand_in_turns():
    rows = torch.arange(2 * HEAD_DIM)
    assert permute_rope(rows, num_heads=2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("shape", [(HEADS * HEAD_DIM, HIDDEN), (HEADS * HEAD_DIM,)], ids=["weight", "bias"])
def test_there_and_back(shape):
    weight = numbered(*shape)
    permuted = permute_rope(weight, num_heads=HEADS)
    assert permuted.is_contiguous()
    assert permuted.dtype == weight.dtype
    assert torch.equal(unpermute_rope(permuted, num_heads=HEADS), weight)
    assert torch.equal(permute_rope(unpermute_rope(weight, num_heads=HEADS), num_heads=HEADS), weight)


def test_twin_permuting_twice_does_not_come_back():
    weight = numbered(HEADS * HEAD_DIM, HIDDEN)
    twice = permute_rope(permute_rope(weight, num_heads=HEADS), num_heads=HEADS)
    assert not torch.equal(twice, weight)


def test_twin_another_number_of_heads_does_not_come_back():
    weight = numbered(HEADS * HEAD_DIM, HIDDEN)
    assert not torch.equal(unpermute_rope(permute_rope(weight, num_heads=HEADS), num_heads=1), weight)


def test_heads_of_odd_width_are_refused():
    message = (
        r"^rope: rows must be an even number for each head, got rows=15, heads=3\. "
        r"Check num_attention_heads, num_key_value_heads and head_dim\.$"
    )
    with pytest.raises(ConversionError, match=message):
        permute_rope(torch.zeros(15, 2), num_heads=3)
