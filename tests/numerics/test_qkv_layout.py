"""The row order of Megatron's fused QKV is the one that megatron-core's own attention uses."""

import dataclasses

import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.tensor_layouts import merge_qkv, split_qkv
from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import build_whole_model, read_arguments, single_rank

HEAD_DIM = LLAMA.head_dim


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def build_attention(num_query_groups: int):
    model = dataclasses.replace(LLAMA, num_query_groups=num_query_groups, has_qkv_bias=True)
    return build_whole_model(read_arguments(model)).decoder.layers[0].self_attention


@pytest.mark.parametrize("num_query_groups", [1, 2, 6])
def test_the_parts_are_what_the_attention_computes(num_query_groups):
    attention = build_attention(num_query_groups)
    generator = torch.Generator().manual_seed(2)
    linear = attention.linear_qkv
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator))
        hidden = torch.randn(7, 2, LLAMA.hidden_size, generator=generator)  # [s, b, h]
        computed = attention.get_query_key_value_tensors(hidden)[:3]
        weights = split_qkv(linear.weight, num_query_groups=num_query_groups, head_dim=HEAD_DIM)
        biases = split_qkv(linear.bias, num_query_groups=num_query_groups, head_dim=HEAD_DIM)
        expected = [
            (hidden @ weight.t() + bias).unflatten(-1, (-1, HEAD_DIM))
            for weight, bias in zip(weights, biases, strict=True)
        ]
    for mine, theirs in zip(expected, computed, strict=True):
        torch.testing.assert_close(mine, theirs)
    merged = merge_qkv(*weights, num_query_groups=num_query_groups, head_dim=HEAD_DIM)
    assert torch.equal(merged, linear.weight)


def test_twin_parts_one_after_the_other_are_not():
    attention = build_attention(LLAMA.num_query_groups)
    with torch.no_grad():
        attention.linear_qkv.weight.normal_()
        hidden = torch.randn(7, 2, LLAMA.hidden_size)
        key = attention.get_query_key_value_tensors(hidden)[1]
        rows = attention.linear_qkv.weight[LLAMA.hidden_size :][: LLAMA.num_query_groups * HEAD_DIM]
    assert not torch.allclose((hidden @ rows.t()).unflatten(-1, (-1, HEAD_DIM)), key)
