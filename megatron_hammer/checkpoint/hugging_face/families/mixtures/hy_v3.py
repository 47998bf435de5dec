"""Hunyuan 3: DeepSeek-V3's router without groups behind Qwen3's attention, and dense layers anywhere."""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import (
    ConfigRow,
    Dropout,
    always_off,
    count,
    number,
    write_value,
)
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.families.mixtures.biased_router import (
    BIASED_CONSTANTS,
    BIASED_FEATURES,
    BIASED_REQUIREMENTS,
    DENSE_LAYERS,
    has_sigmoid_router,
    list_biased_tensors,
    share_experts,
)
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import NO_QKV_BIAS
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.model.shape import ModelShape


def _read_kinds(fields: HfFields) -> Mapping[str, Any]:
    """Without the list, the first layer is dense."""
    num_layers = len(fields.layers())
    kinds = fields.choices("mlp_layer_types", ("dense", "sparse"), length=num_layers)
    dense_layers = (0,) if kinds is None else tuple(i for i, kind in enumerate(kinds) if kind == "dense")
    if len(dense_layers) == num_layers:
        fields.refuse("mlp_layer_types", "no layer would have experts")
    return {"moe.dense_layers": dense_layers}


def _write_kinds(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    kinds = ["sparse" if model.is_mixture(layer) else "dense" for layer in range(model.num_layers)]
    return {"mlp_layer_types": kinds}


HY_V3 = Family(
    model_type="hy_v3",
    hf_classes=("HYV3ForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(default_head_dim=128, default_rope_theta=11_158_840.0, default_epsilon=1e-5),
        always_off("attention_bias", "a bias on o_proj without one on the experts is not mapped"),
        always_off("mlp_bias", "experts have none"),
        ConfigRow(
            lambda fields: {"moe.num_experts": fields.num_experts()}, write_value("num_experts", "moe.num_experts")
        ),
        count("num_experts_per_tok", "moe.router_topk"),
        count("moe_intermediate_size", "moe.ffn_hidden_size"),
        number("router_scaling_factor", "moe.topk_scaling_factor", 2.826),
        share_experts("num_shared_experts", 1),
        ConfigRow(_read_kinds, _write_kinds),
    ),
    constants={**BIASED_CONSTANTS, "moe.is_topk_renormalized": True, "has_qk_norm": True},
    features=BIASED_FEATURES | {DENSE_LAYERS},
    list_tensors=lambda model: list_biased_tensors(
        model, router="mlp.router.gate.weight", bias="mlp.expert_bias", shared="mlp.shared_mlp"
    ),
    is_candidate=has_sigmoid_router,
    requirements=(*BIASED_REQUIREMENTS, NO_QKV_BIAS),
)
