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
    if model.moe is not None and model.has_qk_norm:
        return transformers.Qwen3MoeConfig(
            **common,
            head_dim=model.head_dim,
            num_experts=model.moe.num_experts,
            num_experts_per_tok=model.moe.router_topk,
            moe_intermediate_size=model.moe.ffn_hidden_size,
        )
    if model.has_qk_norm:
        return transformers.Qwen3Config(**common, head_dim=model.head_dim)
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
    "microsoft/Phi-3-mini-4k-instruct without its window": (transformers.Phi3Config(), 3_821_079_552),
    "ByteDance-Seed/Seed-OSS-36B-Base": (transformers.SeedOssConfig(hidden_size=5120), 36_151_104_512),
    "ibm-granite/granite-3.3-2b-instruct": (
        transformers.GraniteConfig(
            num_hidden_layers=40,
            hidden_size=2048,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=49_159,
            tie_word_embeddings=True,
        ),
        2_533_539_840,
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
