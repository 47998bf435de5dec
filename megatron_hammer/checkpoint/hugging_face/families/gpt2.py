"""GPT-2: LayerNorm, learned positions, a plain gelu MLP, and linear layers that store [in, out] (Conv1D)."""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import (
    ConfigRow,
    count,
    number,
    read_kv_channels,
    unwritten,
    write_value,
)
from megatron_hammer.checkpoint.hugging_face.families.llama import HEAD, LAYER
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import CONV1D_QKV_BIAS, CONV1D_QKV_WEIGHT, TRANSPOSED
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorRow, build_rows
from megatron_hammer.model.shape import ModelShape

# --- config.json -----------------------------------------------------------------------------------------------------

# Megatron's gelu with its bias fused is the tanh approximation, which transformers spells in several ways.
_GELU_TANH_NAMES = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _read_heads(fields: HfFields) -> Mapping[str, Any]:
    hidden_size, heads = fields.count("n_embd"), fields.count("n_head")
    # GPT2Attention computes the width of a head and reads no field for it.
    head_dim = fields.head_dim(hidden_size, heads, must_fill=True)
    kv_channels = read_kv_channels(head_dim, hidden_size=hidden_size, heads=heads)
    return {"num_attention_heads": heads, "num_query_groups": heads, **kv_channels}


def _read_ffn_hidden_size(fields: HfFields) -> Mapping[str, Any]:
    return {"ffn_hidden_size": fields.count("n_inner", default=4 * fields.count("n_embd"))}


def _read_activation(fields: HfFields) -> Mapping[str, Any]:
    names = (*_GELU_TANH_NAMES, "gelu")
    name = fields.require_choice("activation_function", names, default="gelu_new")
    return {"activation": "gelu_tanh" if name in _GELU_TANH_NAMES else "gelu_erf"}


def _require_plain_attention(fields: HfFields) -> None:
    if not fields.flag("scale_attn_weights", True):
        fields.refuse("scale_attn_weights", "Megatron divides the scores by the root of the head's width")
    fields.require_false("scale_attn_by_inverse_layer_idx", "a scale of each layer's own is not mapped")
    fields.require_false("add_cross_attention", "cross attention is not mapped")


_CONFIG = (
    count("n_embd", "hidden_size"),
    ConfigRow(_read_ffn_hidden_size, write_value("n_inner", "ffn_hidden_size")),
    count("n_layer", "num_layers"),
    ConfigRow(_read_heads, write_value("n_head", "num_attention_heads")),
    count("n_positions", "max_position_embeddings"),
    ConfigRow(
        _read_activation,
        lambda model, _: {"activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu"},
    ),
    number("layer_norm_epsilon", "norm_epsilon", 1e-5),
    number("attn_pdrop", "dropout.attention", 0.1),
    # Megatron has one hidden dropout. It is read from resid_pdrop alone, and written to both fields.
    ConfigRow(lambda fields: {}, write_value("embd_pdrop", "dropout.hidden")),
    number("resid_pdrop", "dropout.hidden", 0.1),
    unwritten(_require_plain_attention),
)

# --- tensors ---------------------------------------------------------------------------------------------------------

_HF_LAYER = "transformer.h.{layer}."
_TENSORS = build_rows(
    ("embedding.word_embeddings.weight", "v h", "transformer.wte.weight"),
    ("embedding.position_embeddings.weight", "p h", "transformer.wpe.weight"),
    (LAYER + "self_attention.linear_qkv.layer_norm_weight", "h", _HF_LAYER + "ln_1.weight"),
    (LAYER + "self_attention.linear_qkv.layer_norm_bias", "h", _HF_LAYER + "ln_1.bias"),
    (LAYER + "self_attention.linear_qkv.weight", "qkv h", _HF_LAYER + "attn.c_attn.weight", CONV1D_QKV_WEIGHT),
    (LAYER + "self_attention.linear_qkv.bias", "qkv", _HF_LAYER + "attn.c_attn.bias", CONV1D_QKV_BIAS),
    (LAYER + "self_attention.linear_proj.weight", "h q", _HF_LAYER + "attn.c_proj.weight", TRANSPOSED),
    (LAYER + "self_attention.linear_proj.bias", "h", _HF_LAYER + "attn.c_proj.bias"),
    (LAYER + "mlp.linear_fc1.layer_norm_weight", "h", _HF_LAYER + "ln_2.weight"),
    (LAYER + "mlp.linear_fc1.layer_norm_bias", "h", _HF_LAYER + "ln_2.bias"),
    (LAYER + "mlp.linear_fc1.weight", "f h", _HF_LAYER + "mlp.c_fc.weight", TRANSPOSED),
    (LAYER + "mlp.linear_fc1.bias", "f", _HF_LAYER + "mlp.c_fc.bias"),
    (LAYER + "mlp.linear_fc2.weight", "h f", _HF_LAYER + "mlp.c_proj.weight", TRANSPOSED),
    (LAYER + "mlp.linear_fc2.bias", "h", _HF_LAYER + "mlp.c_proj.bias"),
    ("decoder.final_layernorm.weight", "h", "transformer.ln_f.weight"),
    ("decoder.final_layernorm.bias", "h", "transformer.ln_f.bias"),
)


def _list_tensors(model: ModelShape) -> tuple[TensorRow, ...]:
    return _TENSORS if model.has_tied_embeddings else _TENSORS + HEAD


# --- which models ----------------------------------------------------------------------------------------------------

GPT2 = Family(
    model_type="gpt2",
    hf_classes=("GPT2LMHeadModel",),
    is_tied_by_default=True,
    config=_CONFIG,
    constants={
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "has_linear_bias": True,
        "has_qkv_bias": True,
    },
    list_tensors=_list_tensors,
    is_candidate=lambda model: model.normalization == "LayerNorm",
    requirements=(
        Requirement(
            lambda model: model.position_embedding_type == "learned_absolute",
            "normalization=LayerNorm with rope",
            "only GPT-2, with learned positions, is mapped",
        ),
        Requirement(
            lambda model: model.activation != "swiglu" and model.moe is None,
            "normalization=LayerNorm with a gated MLP or experts",
            "GPT-2's MLP is plain gelu",
        ),
        Requirement(
            lambda model: model.has_linear_bias,
            "normalization=LayerNorm without biases",
            "every linear layer of GPT-2 has one",
        ),
        Requirement(
            lambda model: model.num_query_groups == model.num_attention_heads,
            lambda model: f"num_query_groups={model.num_query_groups}",
            "GPT-2 has multi-head attention only",
        ),
        Requirement(
            lambda model: not model.has_qk_norm,
            "normalization=LayerNorm with qk_layernorm=True",
            "GPT-2 has no norm on queries and keys",
        ),
        Requirement(
            lambda model: model.head_dim * model.num_attention_heads == model.hidden_size,
            lambda model: f"kv_channels={model.head_dim}",
            "GPT-2's heads fill hidden_size exactly",
        ),
    ),
)
