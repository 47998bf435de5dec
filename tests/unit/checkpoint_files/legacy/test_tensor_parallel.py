"""Parts that were cut by hand are merged again, and every rule notices a twin with one fault."""

import pytest
import torch

from megatron_hammer.checkpoint_files.legacy.tensor_parallel import (
    COLUMN,
    GATED_COLUMN,
    REPLICATED,
    ROW,
    merge_columns,
    merge_gated_columns,
    merge_rows,
    order_qkv_by_heads,
    select_rank_layout,
)
from megatron_hammer.errors import ConversionError
from tests.helpers.tensor_parallel_parts import (
    order_qkv_by_version,
    split_columns,
    split_gated_columns,
    split_rows,
)

PAIRS = [
    (split_columns, merge_columns),
    (split_rows, merge_rows),
    (split_gated_columns, merge_gated_columns),
]


@pytest.mark.parametrize("split, merge", PAIRS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_and_merge_are_inverses(split, merge, num_ranks, dtype):
    weight = torch.randn(60, 42).to(dtype)
    parts = split(weight, num_ranks)
    assert len(parts) == num_ranks
    assert torch.equal(merge(parts), weight)


def test_each_rank_holds_its_own_rows():
    weight = torch.arange(8 * 6).reshape(8, 6)
    assert torch.equal(split_columns(weight, 2)[1], weight[4:])
    assert torch.equal(split_rows(weight, 2)[1], weight[:, 3:])
    assert torch.equal(split_gated_columns(weight, 2)[1], weight[[2, 3, 6, 7]])  # gate's rows, then up's


def test_a_bias_is_cut_as_its_weight():
    bias = torch.randn(60)
    assert torch.equal(merge_gated_columns(split_gated_columns(bias, 3)), bias)
    assert torch.equal(merge_columns(split_columns(bias, 3)), bias)


def test_gate_and_up_merged_as_plain_rows_are_noticed():
    weight = torch.randn(60, 42)
    parts = split_gated_columns(weight, 2)
    assert not torch.equal(merge_columns(parts), weight)
    assert not torch.equal(merge_gated_columns(parts[::-1]), weight)


def test_sizes_that_do_not_fit_are_refused():
    weight = torch.randn(10, 9)
    with pytest.raises(ConversionError, match=r"must hold gate and up of a rank, got size=9\b"):
        merge_gated_columns([weight.t(), weight.t()])


@pytest.mark.parametrize("checkpoint_version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("rest", [(), (7,)])
def test_the_order_of_every_checkpoint_version_is_undone(checkpoint_version, rest):
    num_heads, head_dim = 5, 4
    qkv = torch.randn(3 * num_heads * head_dim, *rest)
    options = {"checkpoint_version": checkpoint_version, "head_dim": head_dim}
    stored = order_qkv_by_version(qkv, **options)
    assert torch.equal(order_qkv_by_heads(stored, **options), qkv)
    assert torch.equal(stored, qkv) == (checkpoint_version >= 2)


def test_which_row_is_which_in_versions_0_and_1():
    """Element d of the key of head n: row n*3*D + D + d today, N*D + n*D + d in version 0, n*D*3 + d*3 + 1 in 1."""
    num_heads, head_dim = 5, 4
    rows = torch.arange(3 * num_heads * head_dim)
    for head in range(num_heads):
        for element in range(head_dim):
            today = head * 3 * head_dim + head_dim + element
            version_0 = order_qkv_by_heads(rows, checkpoint_version=0, head_dim=head_dim)
            assert version_0[today] == num_heads * head_dim + head * head_dim + element
            version_1 = order_qkv_by_heads(rows, checkpoint_version=1, head_dim=head_dim)
            assert version_1[today] == head * head_dim * 3 + element * 3 + 1


def test_broken_heads_are_refused():
    with pytest.raises(ConversionError, match="must hold q, k and v of every head, got size=50, which 12 does not"):
        order_qkv_by_heads(torch.randn(50), checkpoint_version=0, head_dim=4)


@pytest.mark.parametrize(
    "name, layout",
    [
        ("embedding.word_embeddings.weight", COLUMN),
        ("embedding.position_embeddings.weight", REPLICATED),
        ("output_layer.weight", COLUMN),
        ("decoder.layers.11.self_attention.linear_qkv.bias", COLUMN),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", REPLICATED),
        ("decoder.layers.0.self_attention.linear_proj.weight", ROW),
        ("decoder.layers.0.self_attention.linear_proj.bias", REPLICATED),
        ("decoder.layers.0.self_attention.q_layernorm.weight", REPLICATED),
        ("decoder.layers.0.mlp.linear_fc1.weight", GATED_COLUMN),
        ("decoder.layers.0.mlp.linear_fc2.weight", ROW),
        ("decoder.layers.0.mlp.linear_fc2.bias", REPLICATED),
        ("decoder.layers.0.mlp.experts.experts.13.linear_fc1.weight", GATED_COLUMN),
        ("decoder.layers.0.mlp.experts.experts.13.linear_fc2.weight", ROW),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", GATED_COLUMN),
        ("decoder.layers.0.mlp.shared_experts.gate_weight", REPLICATED),
        ("decoder.layers.0.mlp.router.weight", REPLICATED),
        ("decoder.final_layernorm.weight", REPLICATED),
        ("decoder.layers.0.mlp.linear_fc3.weight", None),
        ("encoder.layers.0.mlp.linear_fc1.weight", None),
    ],
)
def test_every_name_has_its_layout(name, layout):
    assert select_rank_layout(name, is_gated=True) is layout
    assert select_rank_layout(name, is_gated=False) is (COLUMN if layout is GATED_COLUMN else layout)
