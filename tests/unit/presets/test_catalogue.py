"""Every preset is complete, its stated parameter count agrees with its shape, and a wrong name gets a suggestion."""

import dataclasses

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import (
    count_parameters,
    count_rank_parameters,
    find_shard_problems,
    find_split_problems,
)
from megatron_hammer.presets.catalogue import PRESETS, select_preset
from tests.helpers.recipe_layouts import build_layout

# Figures printed by others, not by this repository.
PUBLISHED_PARAMETERS = {
    "hammer-1b4": 1_402_288_128,  # HammerLLM model.safetensors
    "tinyllama-1b1": 1_100_048_384,  # TinyLlama/TinyLlama-1.1B
    "open-llama-7b": 6_885_879_808,  # Open-Llama README_en.md
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gpt2-124m": 124_439_808,
}


@pytest.mark.parametrize("name", PRESETS)
def test_literal_count_is_the_counted_one(name):
    model = PRESETS[name].model
    assert count_parameters(model) == PRESETS[name].num_parameters
    assert model.name == name


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_count_is_the_published_one(name):
    assert PRESETS[name].num_parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("size, rounded", [("16m", 16), ("42m", 42), ("92m", 92), ("210m", 210), ("440m", 440)])
def test_tiny_llm_zh_is_as_large_as_its_name_says(size, rounded):
    millions = PRESETS[f"tiny-llm-zh-{size}"].num_parameters / 1e6
    assert millions == pytest.approx(rounded, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_fits_its_model(name):
    model, recipe = PRESETS[name].model, PRESETS[name].recipe
    assert model.source
    assert recipe.source
    assert recipe.seq_length <= model.max_position_embeddings
    assert 0 <= recipe.min_lr < recipe.lr
    assert recipe.lr_warmup_steps < recipe.train_steps
    assert recipe.global_batch_size % recipe.micro_batch_size == 0
    assert recipe.has_sequence_parallel == (recipe.tensor_model_parallel_size > 1)


@pytest.mark.parametrize("name", PRESETS)
def test_published_layout_holds_every_parameter_once(name):
    model, layout = PRESETS[name].model, build_layout(PRESETS[name].recipe)
    assert find_shard_problems(model, layout) == ()
    assert find_split_problems(model.num_layers, layout) == ()
    ranks = [count_rank_parameters(model, layout, stage) for stage in range(layout.pipeline_model_parallel_size)]
    # TP repeats norms and row-parallel biases and pads the vocabulary; nothing else may exceed the model.
    num_parameters = PRESETS[name].num_parameters
    surplus = layout.tensor_model_parallel_size * sum(rank.total for rank in ranks) - num_parameters
    assert 0 <= surplus < 0.01 * num_parameters


def test_hammer_recipe_is_the_published_one():
    recipe = PRESETS["hammer-1b4"].recipe
    assert recipe.tokens_per_step == 2_097_152
    assert recipe.train_steps == 1_000_000
    assert (recipe.lr, recipe.min_lr, recipe.lr_warmup_steps) == (5e-4, 5e-5, 2000)


def test_hammer_tiny_has_the_ratios_of_hammer_1b4():
    tiny, full = PRESETS["hammer-tiny"].model, PRESETS["hammer-1b4"].model
    assert tiny.num_attention_heads // tiny.num_query_groups == full.num_attention_heads // full.num_query_groups == 8
    assert tiny.ffn_hidden_size / tiny.hidden_size == full.ffn_hidden_size / full.hidden_size == 2.75
    shape = {"name", "source", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
    shape |= {"num_query_groups", "vocab_size", "max_position_embeddings"}
    for spec in dataclasses.fields(full):
        if spec.name not in shape:
            assert getattr(tiny, spec.name) == getattr(full, spec.name), spec.name


@pytest.mark.parametrize(
    "parallel", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["tp2", "pp2"]
)
@pytest.mark.parametrize("name", ["hammer-tiny", "hammer-tiny-moe"])
def test_miniatures_can_be_cut_in_two(name, parallel):
    recipe = dataclasses.replace(PRESETS[name].recipe, has_sequence_parallel=True, **parallel)
    assert find_shard_problems(PRESETS[name].model, build_layout(recipe)) == ()


def test_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"preset: must be a shipped one, got preset='hammer-1\.4b'") as caught:
        select_preset("hammer-1.4b")
    assert "Did you mean hammer-1b4" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)


def test_unknown_preset_without_a_neighbour_lists_all():
    with pytest.raises(ConfigError, match=r"got preset='xyz'\. Use one of: gpt2-124m"):
        select_preset("xyz")


def test_known_preset_is_found():
    assert select_preset("llama3-70b") is PRESETS["llama3-70b"]
