"""Families that a study takes and training does not: what their config.json says, and what is refused by its name."""

import json
from typing import Any

import pytest

from megatron_hammer.checkpoint.hugging_face.studied_families.catalogue import (
    STUDIED,
    interpret_studied_config,
    read_studied_model,
)
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import (
    LatentAttention,
    ModelShape,
    MoeShape,
    RopeScaling,
    SlidingWindow,
    YarnScaling,
)

COMMON = {
    "vocab_size": 501,
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
DEEPSEEK = COMMON | {
    "model_type": "deepseek_v3",
    "intermediate_size": 136,
    "moe_intermediate_size": 28,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
}
GPT_OSS = COMMON | {
    "model_type": "gpt_oss",
    "intermediate_size": 52,
    "head_dim": 10,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 12,
    "rope_theta": 150_000.0,
    "router_aux_loss_coef": 0.9,
}
LLAMA4 = COMMON | {
    "model_type": "llama4_text",
    "intermediate_size": 52,
    "intermediate_size_mlp": 136,
    "head_dim": 16,
    "num_key_value_heads": 3,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
    "no_rope_layers": [],
    "use_qk_norm": True,
}
CONFIGS = {config["model_type"]: config for config in (DEEPSEEK, GPT_OSS, LLAMA4)}


def read(config: dict[str, Any], **changes: Any) -> ModelShape:
    return interpret_studied_config(config | changes)


def test_every_studied_family_is_here():
    assert CONFIGS.keys() == STUDIED.keys()


def test_deepseek_has_latent_attention_first_dense_layers_and_one_for_a_further_token():
    model = read(DEEPSEEK)
    assert model.latent_attention == LatentAttention(
        q_lora_rank=20, kv_lora_rank=12, qk_head_dim=10, qk_pos_emb_head_dim=4, v_head_dim=8
    )
    assert (model.head_dim, model.value_dim, model.num_query_groups, model.has_qk_norm) == (14, 8, 6, True)
    assert model.moe == MoeShape(
        num_experts=16,
        router_topk=4,
        ffn_hidden_size=28,
        shared_expert_intermediate_size=56,
        is_topk_renormalized=True,
        aux_loss_coeff=0.0,
        dense_layers=(0, 1),
        score_function="sigmoid",
        has_expert_bias=True,
        topk_scaling_factor=2.5,
        num_groups=4,
        group_topk=2,
    )
    assert (model.ffn_hidden_size, model.num_mtp_layers) == (136, 1)
    assert read(DEEPSEEK, num_nextn_predict_layers=0).num_mtp_layers == 0
    assert read(DEEPSEEK, q_lora_rank=None).latent_attention.q_lora_rank is None


def test_gpt_oss_has_sinks_biases_and_a_window_in_every_second_layer():
    model = read(GPT_OSS)
    assert (model.has_attention_sinks, model.has_linear_bias, model.has_qkv_bias) == (True, True, True)
    assert (model.activation, model.kv_channels, model.num_query_groups) == ("clamped_swiglu", 10, 2)
    assert model.sliding_window == SlidingWindow(num_tokens=12, layers=(0, 2, 4))
    assert model.moe == MoeShape(
        num_experts=8, router_topk=3, ffn_hidden_size=52, is_topk_renormalized=True, aux_loss_coeff=0.9
    )
    # The class's own rope, unless the file has one.
    assert model.rope_scaling == YarnScaling(factor=32, original_max_position_embeddings=4096, has_whole_bounds=False)
    assert read(GPT_OSS, rope_parameters={"rope_type": "default", "rope_theta": 150_000.0}).rope_scaling is None


def test_llama4_has_chunks_interleaved_experts_and_layers_without_rope():
    model = read(LLAMA4)
    assert model.sliding_window == SlidingWindow(num_tokens=16, layers=(0, 1, 2, 4), is_chunked=True)
    assert (model.layers_without_rope, model.has_query_temperature, model.has_qk_l2_norm) == ((3,), True, True)
    assert model.moe == MoeShape(
        num_experts=8,
        router_topk=1,
        ffn_hidden_size=52,
        shared_expert_intermediate_size=52,
        aux_loss_coeff=0.001,
        dense_layers=(0, 2, 4),
        score_function="sigmoid",
        has_scaled_inputs=True,
    )
    assert model.ffn_hidden_size == 136
    assert read(LLAMA4, moe_layers=[0, 4]).moe.dense_layers == (1, 2, 3)
    assert read(LLAMA4, attention_chunk_size=64).sliding_window is None  # as long as the longest sequence
    kinds = ["full_attention", *["chunked_attention"] * 4]
    assert read(LLAMA4, layer_types=kinds).sliding_window.layers == (1, 2, 3, 4)
    stretch = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    scaled = read(LLAMA4, rope_scaling=stretch | {"original_max_position_embeddings": 32})
    assert scaled.rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=32
    )


def test_of_a_model_that_sees_images_the_text_part_is_studied(tmp_path):
    path = tmp_path / "scout.json"
    text = {name: value for name, value in LLAMA4.items() if name != "tie_word_embeddings"}
    path.write_text(json.dumps({"model_type": "llama4", "tie_word_embeddings": True, "text_config": text}))
    model = read_studied_model(path)
    assert (model.name, model.has_tied_embeddings) == ("scout-text", True)
    assert model == read(LLAMA4, tie_word_embeddings=True)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_how_the_weights_are_stored_says_nothing_of_a_training(model_type):
    assert read(CONFIGS[model_type], quantization_config={"quant_method": "fp8"}) == read(CONFIGS[model_type])


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        (DEEPSEEK, {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK, {"num_key_value_heads": 3}, "num_key_value_heads.*of 6 heads"),
        (DEEPSEEK, {"kv_lora_rank": 0}, "kv_lora_rank.*positive"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DEEPSEEK, {"attention_chunk_size": 8}, "attention_chunk_size"),
        (DEEPSEEK, {"index_topk": 2048}, "index_topk.*sparse attention"),
        (GPT_OSS, {"experts_per_token": 7}, "experts_per_token.*num_experts_per_tok says"),
        (GPT_OSS, {"attention_bias": False}, "attention_bias.*experts have biases"),
        (GPT_OSS, {"swiglu_limit": 6.0}, "swiglu_limit.*6.0"),
        (GPT_OSS, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        (LLAMA4, {"attention_bias": True}, "attention_bias"),
        (LLAMA4, {"moe_layers": []}, "moe_layers.*must have experts"),
        (LLAMA4, {"moe_layers": [1, 5]}, "moe_layers.*5 layers"),
        (LLAMA4, {"attn_scale": 0.2}, "attn_scale"),
        (LLAMA4, {"layer_types": ["sliding_attention"] * 5}, "layer_types.*chunked_attention"),
        (LLAMA4, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor.*positive"),
        ({"model_type": "gemma3"}, {}, "model_type.*deepseek_v3.*got model_type='gemma3': its norms"),
    ],
)
def test_what_a_study_cannot_take_is_refused_by_its_name(config, changes, match):
    with pytest.raises(ConversionError, match=match):
        read(config, **changes)
