"""The text model of Llama 4: attention within chunks but in every fourth layer, which has no rope; experts of which a
token has one beside the shared one, in every layer or in every second.

Source: transformers.models.llama4.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import always_off, count, flag, number
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.family import ConfigFamily
from megatron_hammer.checkpoint.hugging_face.studied_families.studied_rows import read_only, require_number
from megatron_hammer.model.shape import SlidingWindow

_LAYER_TYPES = ("chunked_attention", "full_attention")


def select_text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The text model's part of a config.json of model_type llama4, which also sees images; None for any other file."""
    text = config.get("text_config")
    if config.get("model_type") != "llama4" or not isinstance(text, dict):
        return None
    # Version 4 wrote the tie beside the parts.
    is_tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {"model_type": LLAMA4_TEXT.model_type, **is_tied, **text}


def _read_experts(fields: HfFields) -> Mapping[str, Any]:
    """intermediate_size is the width of an expert, shared or not."""
    width = fields.count("intermediate_size")
    return {
        "moe.num_experts": fields.num_experts(),
        "moe.ffn_hidden_size": width,
        "moe.shared_expert_intermediate_size": width,
        "moe.dense_layers": _list_dense_layers(fields),
    }


def _list_dense_layers(fields: HfFields) -> tuple[int, ...]:
    """Those not in moe_layers, or without that list all but every interleave_moe_layer_step-th."""
    layers = fields.layers()
    if fields.has_value("moe_layers", None):
        mixtures = fields.numbers("moe_layers")
    else:
        step = fields.count("interleave_moe_layer_step", 1)
        mixtures = list(range(step - 1, len(layers), step))
    dense = tuple(layer for layer in layers if layer not in mixtures)
    if len(dense) == len(layers) or set(mixtures) - set(layers):
        fields.refuse("moe_layers", f"of {len(layers)} layers, one or more must have experts, and no other can")
    return dense


def _read_layers(fields: HfFields) -> Mapping[str, Any]:
    """Layers without a rope see everything, the others what is in their chunk, unless layer_types says otherwise."""
    num_layers = len(fields.layers())
    without_rope = fields.layers_without_rope(num_layers, may_be_empty=True)
    kinds = fields.choices("layer_types", _LAYER_TYPES, length=num_layers)
    if kinds is None:
        chunked = tuple(layer for layer in range(num_layers) if layer not in without_rope)
    else:
        chunked = tuple(layer for layer, kind in enumerate(kinds) if kind == "chunked_attention")
    has_chunks = bool(chunked) and fields.has_value("attention_chunk_size", 8192)
    size = fields.count("attention_chunk_size", 8192) if has_chunks else 0
    # A chunk as long as the longest sequence cuts nothing.
    is_cut = has_chunks and size < fields.count("max_position_embeddings")
    has_temperature = fields.flag("attn_temperature_tuning", True)
    require_number(fields, "floor_scale", 8192, "ModelShape has the published function only")
    require_number(fields, "attn_scale", 0.1, "ModelShape has the published function only")
    return {
        "layers_without_rope": without_rope,
        "sliding_window": SlidingWindow(num_tokens=size, layers=chunked, is_chunked=True) if is_cut else None,
        "has_query_temperature": has_temperature and bool(without_rope),
    }


LLAMA4_TEXT = ConfigFamily(
    model_type="llama4_text",
    hf_classes=("Llama4ForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(
            mlp_width=count("intermediate_size_mlp", "ffn_hidden_size"),
            default_head_dim=128,
            default_rope_theta=500_000.0,
            default_epsilon=1e-5,
            has_fixed_rope_bounds=False,
        ),
        always_off("attention_bias", "biases of its attention are not counted"),
        flag("use_qk_norm", "has_qk_l2_norm", True),
        read_only(_read_experts),
        count("num_experts_per_tok", "moe.router_topk"),
        number("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001),
        read_only(_read_layers),
    ),
    constants={"moe.score_function": "sigmoid", "moe.has_scaled_inputs": True},
    own_fields=frozenset(
        ("layer_types", "use_qk_norm", "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size")
    )
    | {"attn_temperature_tuning", "quantization_config"},
)
