"""The four FLOP conventions, at their published values and by hand."""

import dataclasses

import pytest

from megatron_hammer.model.flops import FLOP_CONVENTIONS, count_attended_keys, count_flops_per_token
from megatron_hammer.model.shape import MoeShape, SlidingWindow
from megatron_hammer.presets.catalogue import PRESETS

HAMMER = PRESETS["hammer-1b4"].model


@pytest.mark.parametrize("convention, gflops", [("A", 7.667), ("B", 8.221), ("C", 8.414), ("D", 9.521)])
def test_hammer_1b4_at_2048(convention, gflops):
    assert round(count_flops_per_token(HAMMER, 2048, convention) / 1e9, 3) == gflops


def test_a_is_the_default_and_every_convention_is_named():
    assert count_flops_per_token(HAMMER, 2048) == count_flops_per_token(HAMMER, 2048, "A")
    assert list(FLOP_CONVENTIONS) == ["A", "B", "C", "D"]


def test_attention_grows_with_the_sequence_and_causal_attention_half_as_fast():
    def slope(convention):
        return count_flops_per_token(HAMMER, 4096, convention) - count_flops_per_token(HAMMER, 2048, convention)

    assert slope("B") == slope("D") == 2 * slope("A") == 12 * 22 * 2048 * 2048
    assert slope("C") == 0


def test_input_embedding_is_work_only_in_c_and_d():
    more_rows = HAMMER.vocab_size + 1000
    for convention, rows_counted in {"A": 1000, "B": 1000, "C": 2000, "D": 2000}.items():
        grown = count_flops_per_token(HAMMER, 2048, convention, vocab_size=more_rows)
        assert grown - count_flops_per_token(HAMMER, 2048, convention) == 6 * rows_counted * 2048


def test_a_tied_head_still_works():
    tied = dataclasses.replace(HAMMER, has_tied_embeddings=True)
    assert count_flops_per_token(tied, 2048, "A") == count_flops_per_token(HAMMER, 2048, "A")
    saved = count_flops_per_token(HAMMER, 2048, "C") - count_flops_per_token(tied, 2048, "C")
    assert saved == 6 * 105_789 * 2048


@pytest.mark.parametrize("convention", "ABCD")
def test_idle_experts_do_no_work_but_routing(convention):
    def flops(num_experts, topk):
        moe = MoeShape(num_experts=num_experts, router_topk=topk, ffn_hidden_size=704)
        return count_flops_per_token(dataclasses.replace(HAMMER, moe=moe), 2048, convention)

    router = 6 * 22 * 8 * 2048 if convention in "CD" else 0  # Megatron-LM leaves the router out
    assert flops(16, 2) - flops(8, 2) == router
    assert flops(8, 3) - flops(8, 2) == 6 * 22 * 3 * 704 * 2048


@pytest.mark.parametrize("num_tokens", [1, 5, 12, 23, 24, 40])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_attended_keys_are_the_average_of_every_position(num_tokens, is_chunked):
    length = 24
    window = SlidingWindow(num_tokens=num_tokens, layers=(0,), is_chunked=is_chunked)
    if is_chunked:
        seen = [position % num_tokens + 1 for position in range(length)]
    else:
        seen = [min(position + 1, num_tokens) for position in range(length)]
    model = dataclasses.replace(HAMMER, sliding_window=window)
    assert count_attended_keys(model, length) == sum(seen) / length
    assert count_attended_keys(HAMMER, length) == (length + 1) / 2
