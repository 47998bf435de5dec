"""Llama, and what its descendants share with it: rows of config.json, rows of tensors, and requirements.

A descendant calls `llama_config` with its class's own defaults and adds its rows, and `list_llama_tensors` with the
rows of its MLP.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import (
    ConfigRow,
    Dropout,
    count,
    fixed,
    number,
    read_kv_channels,
    unwritten,
    write_value,
)
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP, QKV, TensorLayout
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorRow, build_rows, mark_rows
from megatron_hammer.checkpoint.hugging_face.yarn_fields import write_yarn
from megatron_hammer.model.shape import ModelShape, YarnScaling

# --- config.json -----------------------------------------------------------------------------------------------------


def _write_rope_scaling(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    """As transformers 4 spells it; version 5 reads it too."""
    scaling, interpolation = model.rope_scaling, model.rotary_seq_len_interpolation_factor
    if isinstance(scaling, YarnScaling):
        return {"rope_scaling": write_yarn(scaling)}
    if scaling is not None:
        return {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        }
    if interpolation is not None:
        return {"rope_scaling": {"rope_type": "linear", "factor": float(interpolation)}}
    return {}


_MLP_WIDTH = count("intermediate_size", "ffn_hidden_size")


def llama_config(
    *,
    mlp_width: ConfigRow = _MLP_WIDTH,
    head_width: ConfigRow | None = None,
    # None: LlamaConfig divides hidden_size by the number of heads. Qwen3Config has a number instead.
    default_head_dim: int | None = None,
    default_rope_theta: float = 10_000.0,
    default_epsilon: float = 1e-6,
    default_attention_dropout: float = 0.0,
    may_lack_groups: bool = False,
    has_partial_rope: bool = False,
    default_rotary_percent: float = 1.0,
    has_fixed_rope_bounds: bool = True,
) -> tuple[ConfigRow, ...]:
    """The fields of LlamaConfig that all descendants have. default_*: of the descendant's class in transformers.

    head_width: in place of head_dim. may_lack_groups: its older files have no num_key_value_heads. has_partial_rope: it
    may turn a share of a head. has_fixed_rope_bounds: as HfFields.rope.
    """

    def read_groups(fields: HfFields) -> Mapping[str, Any]:
        heads = fields.count("num_attention_heads")
        return {"num_query_groups": fields.query_groups(heads, may_be_absent=may_lack_groups)}

    def read_head_dim(fields: HfFields) -> Mapping[str, Any]:
        hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        head_dim = fields.head_dim(hidden_size, heads, default=default_head_dim)
        return read_kv_channels(head_dim, hidden_size=hidden_size, heads=heads)

    def read_rope(fields: HfFields) -> Mapping[str, Any]:
        rope = fields.rope(
            default_rope_theta,
            may_be_partial=has_partial_rope,
            default_percent=default_rotary_percent,
            has_fixed_bounds=has_fixed_rope_bounds,
        )
        return {
            "rotary_base": rope.base,
            "rope_scaling": rope.scaling,
            "rotary_seq_len_interpolation_factor": rope.interpolation_factor,
            "rotary_percent": rope.percent,
        }

    return (
        count("hidden_size", "hidden_size"),
        mlp_width,
        count("num_hidden_layers", "num_layers"),
        count("num_attention_heads", "num_attention_heads"),
        ConfigRow(read_groups, write_value("num_key_value_heads", "num_query_groups")),
        head_width or ConfigRow(read_head_dim, write_value("head_dim", "head_dim")),
        fixed(
            "hidden_act",
            "silu",
            lambda fields: fields.require_choice("hidden_act", ("silu", "swish"), default="silu"),
        ),
        count("max_position_embeddings", "max_position_embeddings"),
        number("rms_norm_eps", "norm_epsilon", default_epsilon),
        # A float, as transformers writes it.
        ConfigRow(read_rope, lambda model, _: {"rope_theta": float(model.rotary_base)}),
        number("attention_dropout", "dropout.attention", default_attention_dropout),
        ConfigRow(lambda fields: {}, _write_rope_scaling),
        *((ConfigRow(lambda fields: {}, write_value("partial_rotary_factor", "rotary_percent")),) * has_partial_rope),
    )


def _read_biases(fields: HfFields) -> Mapping[str, Any]:
    has_bias = fields.flag("attention_bias", False)
    # Megatron has one flag, --add-bias-linear, for the biases of attention and MLP.
    if has_bias != fields.flag("mlp_bias", False):
        fields.refuse("attention_bias", "Megatron biases every linear layer or only q, k and v; mlp_bias differs")
    return {"has_linear_bias": has_bias, "has_qkv_bias": has_bias}


def _write_biases(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    return {"attention_bias": model.has_linear_bias, "mlp_bias": model.has_linear_bias}


BIASES = ConfigRow(_read_biases, _write_biases)

# --- tensors ---------------------------------------------------------------------------------------------------------

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_FRONT = build_rows(
    ("embedding.word_embeddings.weight", "v h", "model.embed_tokens.weight"),
    (LAYER + "self_attention.linear_qkv.layer_norm_weight", "h", HF_LAYER + "input_layernorm.weight"),
)
_BACK = build_rows(
    (LAYER + "self_attention.linear_proj.weight", "h q", HF_LAYER + "self_attn.o_proj.weight"),
    ("decoder.final_layernorm.weight", "h", "model.norm.weight"),
)
_QK_NORM = build_rows(
    (LAYER + "self_attention.q_layernorm.weight", "d", HF_LAYER + "self_attn.q_norm.weight"),
    (LAYER + "self_attention.k_layernorm.weight", "d", HF_LAYER + "self_attn.k_norm.weight"),
)
_MLP = build_rows(
    (LAYER + "mlp.linear_fc1.layer_norm_weight", "h", HF_LAYER + "post_attention_layernorm.weight"),
    (LAYER + "mlp.linear_fc1.weight", "2f h", HF_LAYER + "mlp.<gate|up>_proj.weight", GATE_UP),
    (LAYER + "mlp.linear_fc2.weight", "h f", HF_LAYER + "mlp.down_proj.weight"),
)
DENSE_MLP = mark_rows(_MLP, layers="dense")  # of a model that has mixtures of experts in other layers
_LINEAR_BIAS = build_rows(
    (LAYER + "self_attention.linear_proj.bias", "h", HF_LAYER + "self_attn.o_proj.bias"),
    (LAYER + "mlp.linear_fc1.bias", "2f", HF_LAYER + "mlp.<gate|up>_proj.bias", GATE_UP),
    (LAYER + "mlp.linear_fc2.bias", "h", HF_LAYER + "mlp.down_proj.bias"),
)
# Not part of _BACK: tied models use the embedding as their head and store no second tensor.
HEAD = build_rows(("output_layer.weight", "v h", "lm_head.weight"))


def list_llama_tensors(
    model: ModelShape,
    mlp: tuple[TensorRow, ...] = _MLP,
    *,
    qkv_name: str = "self_attn.<q|k|v>_proj",
    qkv_layout: TensorLayout = QKV,
) -> tuple[TensorRow, ...]:
    """The rows of a model with this attention and these MLPs; qkv_*: where its query, key and value lie, and how."""
    qkv, hf_qkv = LAYER + "self_attention.linear_qkv", HF_LAYER + qkv_name
    qkv_bias = build_rows((f"{qkv}.bias", "qkv", f"{hf_qkv}.bias", qkv_layout))
    return (
        *_FRONT,
        *build_rows((f"{qkv}.weight", "qkv h", f"{hf_qkv}.weight", qkv_layout)),
        *(qkv_bias if model.has_qkv_bias else ()),
        *_BACK,
        *(_QK_NORM if model.has_qk_norm else ()),
        *mlp,
        *(_LINEAR_BIAS if model.has_linear_bias else ()),
        *(() if model.has_tied_embeddings else HEAD),
    )


# --- which models ----------------------------------------------------------------------------------------------------


def has_whole_heads(model: ModelShape) -> bool:
    """Whether the number of heads divides hidden_size, which LlamaConfig asks for whatever head_dim is."""
    return model.hidden_size % model.num_attention_heads == 0


LLAMA_REQUIREMENTS = (
    Requirement(
        lambda model: model.normalization == "RMSNorm",
        lambda model: f"normalization={model.normalization}",
        "Llama's norms are RMSNorm",
    ),
    Requirement(
        lambda model: model.position_embedding_type == "rope",
        "normalization=RMSNorm with learned positions",
        "Llama rotates queries and keys",
    ),
    Requirement(
        lambda model: model.activation == "swiglu",
        lambda model: f"normalization=RMSNorm with activation={model.activation}",
        "Llama's MLP is swiglu",
    ),
)
LLAMA = Family(
    model_type="llama",
    hf_classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=(
        *llama_config(may_lack_groups=True),
        BIASES,
        unwritten(lambda fields: fields.require_no_window(default=None)),
    ),
    list_tensors=list_llama_tensors,
    # Biases on all linear layers are in no other class. Biases on q, k and v alone are Qwen2, and other widths of heads
    # are Mistral, whose config does not ask that they divide hidden_size.
    is_candidate=lambda model: model.has_linear_bias or (has_whole_heads(model) and not model.has_qkv_bias),
    requirements=(
        *LLAMA_REQUIREMENTS,
        Requirement(
            lambda model: has_whole_heads(model) or not model.has_linear_bias,
            lambda model: f"kv_channels={model.head_dim} with biases",
            "Llama's heads must divide hidden_size",
        ),
    ),
)
