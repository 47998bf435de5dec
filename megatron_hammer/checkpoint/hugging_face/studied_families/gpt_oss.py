"""GPT-OSS: attention with sinks and a window in every other layer, biases everywhere, experts with a clamped SwiGLU.

Source: transformers.models.gpt_oss; the publication is arXiv 2508.10925.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import count, number
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.family import ConfigFamily
from megatron_hammer.checkpoint.hugging_face.studied_families.studied_rows import read_only, require_number
from megatron_hammer.checkpoint.hugging_face.window_rows import LAYER_TYPES, window_in_chosen_layers
from megatron_hammer.model.shape import YarnScaling


def _read_width(fields: HfFields) -> Mapping[str, Any]:
    """All layers have experts; ModelShape has the width of a dense layer, which there is none of, too."""
    width = fields.count("intermediate_size")
    return {"ffn_hidden_size": width, "moe.ffn_hidden_size": width}


def _every_second_layer(fields: HfFields) -> Iterable[int]:
    return range(0, fields.count("num_hidden_layers"), 2)


def _read_biases(fields: HfFields) -> Mapping[str, Any]:
    if not fields.flag("attention_bias", True):
        fields.refuse("attention_bias", "its router and experts have biases, and ModelShape has them in both or none")
    return {"has_linear_bias": True, "has_qkv_bias": True}


def _read_activation(fields: HfFields) -> Mapping[str, Any]:
    require_number(fields, "swiglu_alpha", 1.702, "ModelShape has the published function only")
    require_number(fields, "swiglu_limit", 7.0, "ModelShape has the published function only")
    return {"activation": "clamped_swiglu"}


def _require_one_topk(fields: HfFields) -> Mapping[str, Any]:
    """OpenAI's own files have both names."""
    topk = fields.count("num_experts_per_tok")
    if fields.has_value("experts_per_token", None) and fields.count("experts_per_token") != topk:
        fields.refuse("experts_per_token", f"num_experts_per_tok says {topk}")
    return {}


def _read_default_rope(fields: HfFields) -> Mapping[str, Any]:
    """What the class takes where the file says nothing of the rope."""
    if fields.has_value("rope_scaling", None) or fields.has_value("rope_parameters", None):
        return {}
    return {
        "rope_scaling": YarnScaling(factor=32.0, original_max_position_embeddings=4096, has_whole_bounds=False),
    }


GPT_OSS = ConfigFamily(
    model_type="gpt_oss",
    hf_classes=("GptOssForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(
            mlp_width=read_only(_read_width),
            default_head_dim=64,
            default_rope_theta=150_000.0,
            default_epsilon=1e-5,
        ),
        read_only(_read_default_rope),
        read_only(lambda fields: {"moe.num_experts": fields.num_experts()}),
        count("num_experts_per_tok", "moe.router_topk"),
        read_only(_require_one_topk),
        number("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001),
        window_in_chosen_layers(_every_second_layer, default=128),
        read_only(_read_biases),
        read_only(_read_activation),
    ),
    # The softmax is over the scores of the chosen experts.
    constants={"has_attention_sinks": True, "moe.is_topk_renormalized": True},
    own_fields=LAYER_TYPES | {"quantization_config"},
)
