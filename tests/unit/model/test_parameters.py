"""Parameter counts by hand at dimensions that are all different, and every way in which a model cannot be cut."""

import dataclasses

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.parameters import (
    count_active_parameters,
    count_optimizer_shard,
    count_parameters,
    count_rank_parameters,
    find_shard_problems,
    padded_vocab_size,
)
from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.presets.catalogue import PRESETS

# Larger than toy_model.LLAMA: the layouts below divide its layers, heads and experts.
TOY = ModelShape(
    name="toy",
    source="",
    num_layers=6,
    hidden_size=48,
    ffn_hidden_size=140,
    num_attention_heads=12,
    num_query_groups=4,
    vocab_size=1001,
    max_position_embeddings=20,
)
TOY_MOE = dataclasses.replace(
    TOY, moe=MoeShape(num_experts=10, router_topk=3, ffn_hidden_size=28, shared_expert_intermediate_size=36)
)
# q 48x48, k and v 2 x 16x48, proj 48x48, gate and up 2 x 140x48, down 140x48, two norms.
TOY_LAYER = 48 * 48 + 2 * 16 * 48 + 48 * 48 + 3 * 140 * 48 + 2 * 48


def test_llama_by_hand():
    assert count_parameters(TOY) == 2 * 1001 * 48 + 6 * TOY_LAYER + 48


def test_vocabulary_can_be_overridden():
    assert count_parameters(TOY, 1024) - count_parameters(TOY) == 2 * 23 * 48


def test_each_option_adds_its_own_parameters():
    plain = count_parameters(TOY)
    added = {
        "has_qkv_bias": 6 * (48 + 2 * 16),
        "has_linear_bias": 6 * (48 + 2 * 16 + 48 + 2 * 140 + 48),
        "has_embedding_norm": 2 * 48,
        "has_tied_embeddings": -1001 * 48,
    }
    for option, number in added.items():
        assert count_parameters(dataclasses.replace(TOY, **{option: True})) - plain == number, option
    assert count_parameters(dataclasses.replace(TOY, normalization="LayerNorm")) - plain == 13 * 48
    assert count_parameters(dataclasses.replace(TOY, activation="gelu_tanh")) - plain == -6 * 140 * 48
    learned = dataclasses.replace(TOY, position_embedding_type="learned_absolute")
    assert count_parameters(learned) - plain == 20 * 48


def test_experts_by_hand():
    expert, shared, router = 3 * 28 * 48, 3 * 36 * 48, 10 * 48
    layer = TOY_LAYER - 3 * 140 * 48 + router + shared
    ends = 2 * 1001 * 48 + 48
    assert count_parameters(TOY_MOE) == ends + 6 * (layer + 10 * expert)
    assert count_active_parameters(TOY_MOE) == ends + 6 * (layer + 3 * expert)
    assert count_active_parameters(TOY) == count_parameters(TOY)


@pytest.mark.parametrize(
    "vocab_size, divisible_by, tp, padded",
    [(105_789, 128, 1, 105_856), (105_789, 128, 8, 106_496), (128, 128, 1, 128), (129, 128, 2, 256), (7, 1, 3, 9)],
)
def test_padded_vocab_size(vocab_size, divisible_by, tp, padded):
    assert padded_vocab_size(vocab_size, divisible_by=divisible_by, tensor_model_parallel_size=tp) == padded


def test_rank_of_one_is_the_whole_padded_model():
    assert count_rank_parameters(TOY, ParallelLayout(), 0).total == count_parameters(TOY, 1024)


def test_tied_embedding_is_held_on_both_ends_of_a_pipeline():
    tied = dataclasses.replace(TOY, has_tied_embeddings=True)
    layout = ParallelLayout(pipeline_model_parallel_size=3)
    first, middle, last = (count_rank_parameters(tied, layout, stage).dense for stage in range(3))
    assert middle == 2 * TOY_LAYER
    assert first - middle == 1024 * 48
    assert last - middle == 1024 * 48 + 48
    assert count_rank_parameters(tied, ParallelLayout(), 0).dense == count_parameters(tied, 1024)


def test_llama3_70b_at_its_layout():
    layout = ParallelLayout(
        tensor_model_parallel_size=8, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=5
    )
    model = PRESETS["llama3-70b"].model
    matrices = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28_672 * 8192
    middle = 20 * (matrices // 8 + 2 * 8192)
    assert count_rank_parameters(model, layout, 1).total == middle == 2_139_422_720
    assert count_rank_parameters(model, layout, 0).total == middle + 129_024 // 8 * 8192


def test_optimizer_shard_is_the_ceiling_of_equal_shares():
    layout = ParallelLayout(data_parallel_size=5, context_parallel_size=2)
    local = count_rank_parameters(TOY, layout, 0).dense
    assert count_optimizer_shard(TOY, layout, 0).dense == -(-local // 10)
    whole = dataclasses.replace(layout, has_distributed_optimizer=False)
    assert count_optimizer_shard(TOY, whole, 0).dense == local


def test_expert_shard_is_over_the_expert_data_ranks():
    layout = ParallelLayout(data_parallel_size=6, expert_model_parallel_size=2)
    local, shard = count_rank_parameters(TOY_MOE, layout, 0), count_optimizer_shard(TOY_MOE, layout, 0)
    assert local.expert == 6 * 5 * 3 * 28 * 48
    assert shard.expert == -(-local.expert // 3)
    assert shard.dense == -(-local.dense // 6)
    assert shard.total == shard.dense + shard.expert


REFUSED = {
    "heads": (
        TOY,
        {"tensor_model_parallel_size": 8},
        r"tensor-model-parallel-size: must divide num_attention_heads, got tp=8, num_attention_heads=12\. "
        r"Use 1, 2, 3, 4, 6 or 12\.",
    ),
    "groups": (
        TOY,
        {"tensor_model_parallel_size": 6},
        r"must divide num_query_groups or be a multiple of it, got tp=6, num_query_groups=4\. Use 1, 2 or 4\.",
    ),
    "ffn": (TOY, {"tensor_model_parallel_size": 3}, r"must divide ffn_hidden_size, got tp=3, ffn_hidden_size=140"),
    "hidden": (
        dataclasses.replace(TOY, hidden_size=50),
        {},
        r"num_attention_heads: must divide hidden_size, got num_attention_heads=12, hidden_size=50",
    ),
    "experts of a dense model": (
        TOY,
        {"expert_model_parallel_size": 2, "data_parallel_size": 2},
        r"expert-model-parallel-size: needs a model with experts, got ep=2, model=toy\. Pass 1\.",
    ),
    "experts": (
        TOY_MOE,
        {"expert_model_parallel_size": 3, "data_parallel_size": 3},
        r"expert-model-parallel-size: must divide num_experts, got ep=3, num_experts=10\. Use 1, 2, 5 or 10\.",
    ),
    "expert ffn": (
        TOY_MOE,
        {"expert_tensor_parallel_size": 3, "data_parallel_size": 3},
        r"expert-tensor-parallel-size: must divide moe_ffn_hidden_size, got etp=3, moe_ffn_hidden_size=28",
    ),
    "expert bias": (
        dataclasses.replace(TOY_MOE, has_linear_bias=True),
        {"tensor_model_parallel_size": 2, "has_sequence_parallel": True},
        r"must be 1 for experts with a bias, got etp=2",
    ),
    "experts without sequence parallelism": (
        TOY_MOE,
        {"tensor_model_parallel_size": 2},
        r"sequence-parallel: must be on for experts with tensor parallelism, got tp=2\. Pass --sequence-parallel\.",
    ),
    "shared expert": (
        dataclasses.replace(TOY_MOE, moe=dataclasses.replace(TOY_MOE.moe, shared_expert_intermediate_size=35)),
        {"tensor_model_parallel_size": 2, "has_sequence_parallel": True},
        r"must divide shared_expert_intermediate_size, got tp=2, shared_expert_intermediate_size=35\. Use 1, 5, 7 or",
    ),
    "grid": (TOY, {"context_parallel_size": 0}, r"context-parallel-size: must be at least 1"),
}


@pytest.mark.parametrize("model, sizes, message", REFUSED.values(), ids=REFUSED)
def test_refused_with_a_remedy(model, sizes, message):
    with pytest.raises(ConfigError, match=message):
        count_rank_parameters(model, ParallelLayout(**sizes), 0)


def test_all_problems_at_once():
    layout = ParallelLayout(tensor_model_parallel_size=8, data_parallel_size=3, expert_model_parallel_size=3)
    problems = find_shard_problems(TOY_MOE, layout)
    assert len(problems) == 5
    with pytest.raises(ConfigError) as caught:
        count_rank_parameters(TOY_MOE, layout, 0)
    assert tuple(caught.value.problems) == problems


def test_stage_outside_the_pipeline_is_refused():
    with pytest.raises(ConfigError, match=r"pp_rank: .* got pp_rank=3, pp=3\b"):
        count_rank_parameters(TOY, ParallelLayout(pipeline_model_parallel_size=3), 3)
