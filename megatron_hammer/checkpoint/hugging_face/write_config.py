"""config.json and generation_config.json of a Hugging Face folder, as plain dictionaries; no import of transformers.

`rope_theta` and `torch_dtype` are spelt as transformers 4 and other engines read them; transformers 5 reads them too.
"""

from typing import Any

from megatron_hammer.checkpoint.hugging_face.saved_model import Architecture
from megatron_hammer.checkpoint.hugging_face.tensor_rows import Family
from megatron_hammer.model.shape import MoeShape


def build_config(
    family: Family, model: Architecture, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """config.json of `model`; dtype: "bfloat16", "float16" or "float32"."""
    builders = {
        "gpt2": _gpt2,
        "llama": _llama,
        "mistral": _mistral,
        "mixtral": _mixtral,
        "qwen2": _qwen,
        "qwen2_moe": _qwen2_moe,
        "qwen3": _qwen3,
        "qwen3_moe": _qwen3_moe,
    }
    return {
        "architectures": [family.hf_class],
        "model_type": family.name,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.has_tied_embeddings,
        "use_cache": True,
        **builders[family.name](model),
    }


def build_generation_config(*, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """generation_config.json: which ids begin and end a text, where the tokenizer says so."""
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def _common(model: Architecture) -> dict[str, Any]:
    """What Llama and its descendants share."""
    config = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "attention_dropout": model.attention_dropout,
    }
    scaling, interpolation = model.rope_scaling, model.rotary_seq_len_interpolation_factor
    if interpolation is not None:
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(interpolation)}
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return config


def _llama(model: Architecture) -> dict[str, Any]:
    return {**_common(model), "attention_bias": model.has_linear_bias, "mlp_bias": model.has_linear_bias}


def _mistral(model: Architecture) -> dict[str, Any]:
    return {**_common(model), "sliding_window": None}


def _qwen(model: Architecture) -> dict[str, Any]:
    return {**_common(model), "use_sliding_window": False}


def _qwen3(model: Architecture) -> dict[str, Any]:
    return {**_qwen(model), "attention_bias": False}


def _mixtral(model: Architecture) -> dict[str, Any]:
    """Its MLPs are the experts, so intermediate_size is theirs; a softmax over the chosen logits is its router's."""
    moe = _experts(model)
    return {
        **_common(model),
        "intermediate_size": moe.ffn_hidden_size,
        "sliding_window": None,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk,
        "router_aux_loss_coef": moe.aux_loss_coeff,
    }


def _qwen_moe(model: Architecture) -> dict[str, Any]:
    """Every layer is a mixture. norm_topk_prob: a softmax over the chosen logits is one over all, renormalised."""
    moe = _experts(model)
    return {
        **_qwen(model),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk,
        "norm_topk_prob": moe.is_topk_renormalized,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "router_aux_loss_coef": moe.aux_loss_coeff,
    }


def _qwen2_moe(model: Architecture) -> dict[str, Any]:
    return {
        **_qwen_moe(model),
        "shared_expert_intermediate_size": _experts(model).shared_expert_intermediate_size,
        "qkv_bias": model.has_qkv_bias,
    }


def _qwen3_moe(model: Architecture) -> dict[str, Any]:
    return {**_qwen_moe(model), "attention_bias": False}


def _experts(model: Architecture) -> MoeShape:
    if model.moe is None:
        raise ValueError("select_family gives a class with experts only to a model that has them")
    return model.moe


def _gpt2(model: Architecture) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_position_embeddings,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
    }
