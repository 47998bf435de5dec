"""Every preset that transformers can express has exactly as many parameters there (built without memory, on meta)."""

import dataclasses

import pytest
import torch
import transformers

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.presets import PRESETS, ModelPreset

# transformers has no OpenLlama any more; its body is a tied Llama, the norm on the embedding is counted by hand below.
NO_EQUIVALENT = {"open-llama-7b"}


def build_on_meta(model: ModelPreset) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers_config(model))


def transformers_config(model: ModelPreset):
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


def count_built(model: ModelPreset) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(model).parameters())


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NO_EQUIVALENT])
def test_preset_is_as_large_as_in_transformers(name):
    assert count_built(PRESETS[name].model) == count_parameters(PRESETS[name].model)


def test_open_llama_is_a_tied_llama_with_one_layer_norm_more():
    model = PRESETS["open-llama-7b"].model
    body = dataclasses.replace(model, has_embedding_norm=False)
    assert count_built(body) + 2 * model.hidden_size == count_parameters(model) == 6_885_879_808


def test_twin_a_wrong_number_of_query_groups_is_noticed():
    model = PRESETS["hammer-1b4"].model
    assert count_built(dataclasses.replace(model, num_query_groups=8)) != count_parameters(model)
