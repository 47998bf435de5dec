"""Every preset that transformers can express has exactly as many parameters there (built without memory, on meta)."""

import dataclasses
import json

import pytest
import torch
import transformers

from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS

# transformers has no OpenLlama any more; its body is a tied Llama, the norm on the embedding is counted by hand below.
NO_EQUIVALENT = {"open-llama-7b"}


def build_on_meta(model: ModelShape) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers_config(model))


def transformers_config(model: ModelShape):
    if model.position_embedding_type == "learned_absolute":
        return transformers.GPT2Config(
            n_layer=model.num_layers,
            n_embd=model.hidden_size,
            n_inner=model.ffn_hidden_size,
            n_head=model.num_attention_heads,
            vocab_size=model.vocab_size,
            n_positions=model.max_position_embeddings,
        )
    common = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.has_tied_embeddings,
    }
    if model.moe is not None:
        return transformers.Qwen2MoeConfig(
            **common,
            num_experts=model.moe.num_experts,
            num_experts_per_tok=model.moe.router_topk,
            moe_intermediate_size=model.moe.ffn_hidden_size,
            shared_expert_intermediate_size=model.moe.shared_expert_intermediate_size,
            qkv_bias=model.has_qkv_bias,
        )
    if model.has_qkv_bias:
        return transformers.Qwen2Config(**common)
    return transformers.LlamaConfig(**common)


def count_built(model: ModelShape) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(model).parameters())


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NO_EQUIVALENT])
def test_preset_is_as_large_as_in_transformers(name):
    assert count_built(PRESETS[name].model) == count_parameters(PRESETS[name].model)


def test_open_llama_is_a_tied_llama_with_one_layer_norm_more():
    model = PRESETS["open-llama-7b"].model
    body = dataclasses.replace(model, has_embedding_norm=False)
    assert count_built(body) + 2 * model.hidden_size == count_parameters(model) == 6_885_879_808


# Sizes and exact parameters of published models of families without a shipped preset; source: their config.json.
SMALL_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
LLAMA_3_2 = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072}
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (
        transformers.Qwen2Config(
            num_hidden_layers=24,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        transformers.Qwen3Config(
            num_hidden_layers=28,
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            tie_word_embeddings=True,
            **SMALL_QWEN3,
        ),
        596_049_920,
    ),
    "Qwen/Qwen3-8B": (
        transformers.Qwen3Config(
            num_hidden_layers=36, hidden_size=4096, intermediate_size=12_288, num_attention_heads=32, **SMALL_QWEN3
        ),
        8_190_735_360,
    ),
    "meta-llama/Llama-3.2-1B": (
        transformers.LlamaConfig(
            num_hidden_layers=16,
            hidden_size=2048,
            intermediate_size=8192,
            num_attention_heads=32,
            tie_word_embeddings=True,
            **LLAMA_3_2,
        ),
        1_235_814_400,
    ),
    "mistralai/Mistral-7B-v0.1 without its window": (
        transformers.MistralConfig(sliding_window=None),
        7_241_732_096,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (transformers.MixtralConfig(), 46_702_792_704),
    "Qwen/Qwen1.5-MoE-A2.7B": (transformers.Qwen2MoeConfig(), 14_315_784_192),
    "Qwen/Qwen3-30B-A3B": (
        transformers.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, max_position_embeddings=40_960),
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_read_with_exactly_its_parameters(name, tmp_path):
    config, num_parameters = PUBLISHED[name]
    config.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    shape, _ = interpret_config(document)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    assert count_parameters(shape) == num_parameters == sum(parameter.numel() for parameter in built.parameters())


def test_twin_a_wrong_number_of_query_groups_is_noticed():
    model = PRESETS["hammer-1b4"].model
    assert count_built(dataclasses.replace(model, num_query_groups=8)) != count_parameters(model)
