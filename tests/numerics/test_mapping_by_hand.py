"""The rows of every family against a permutation written by hand, and its names against transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.checkpoint.hugging_face.families.catalogue import FAMILIES, select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_dropout, read_saved_model
from tests.helpers.hf_by_hand import list_shapes, permute_to_megatron, write_config
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments

TOYS = {
    "llama": {},
    "llama with biases": {"add_bias_linear": True},
    "llama tied": {"untie_embeddings_and_output_weights": False},
    "llama of wide heads": {"kv_channels": 10},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 10},
    "mixtral": PLAIN_MOE_ARGUMENTS | {"ffn_hidden_size": 12},  # its config.json has one width for both
    "qwen2 moe": MOE_ARGUMENTS | {"add_qkv_bias": True},
    "qwen2 moe without bias": MOE_ARGUMENTS,
    "qwen3 moe": PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True, "kv_channels": 10},
    "gpt2": GPT2_ARGUMENTS,
    "gpt2 untied": GPT2_ARGUMENTS | {"untie_embeddings_and_output_weights": True},
}


@pytest.fixture(params=TOYS)
def arguments(request):
    return toy_arguments(**TOYS[request.param])


def draw(config):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in list_shapes(config).items()}


def test_the_names_by_hand_are_those_that_transformers_saves(arguments, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(arguments)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == list_shapes(write_config(arguments))


def test_both_directions_are_the_permutation_by_hand(arguments):
    config = write_config(arguments)
    hf = draw(config)
    by_hand = permute_to_megatron(config, hf)
    model = read_saved_model(arguments)
    pairs = expand(select_family(model), model)
    merged = {pair.megatron_name: pair.layout.merge([hf[name] for name in pair.hf_names], model) for pair in pairs}
    assert merged.keys() == by_hand.keys()
    assert all(torch.equal(merged[name], by_hand[name]) for name in by_hand)
    split = {}
    for pair in pairs:
        split |= dict(zip(pair.hf_names, pair.layout.split(by_hand[pair.megatron_name], model), strict=True))
    assert split.keys() == hf.keys()
    assert all(torch.equal(split[name], hf[name]) for name in hf)


def test_the_config_by_hand_describes_the_same_model(arguments):
    assert interpret_config(write_config(arguments)) == (read_saved_model(arguments), read_saved_dropout(arguments))


def test_twin_heads_that_are_not_interleaved_are_noticed():
    arguments = toy_arguments()
    config = write_config(arguments)
    hf, model = draw(config), read_saved_model(arguments)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    pair = next(pair for pair in expand(FAMILIES["llama"], model) if pair.megatron_name == name)
    stacked = torch.cat([hf[name] for name in pair.hf_names])
    assert not torch.equal(stacked, permute_to_megatron(config, hf)[name])
