"""Seed-OSS: a Qwen2 whose heads have a width of their own, and whose biases are a choice."""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, Dropout, number
from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA_REQUIREMENTS, list_llama_tensors, llama_config
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.model.shape import ModelShape


def _read_biases(fields: HfFields) -> Mapping[str, Any]:
    has_qkv_bias, has_output_bias = fields.flag("attention_bias", True), fields.flag("attention_out_bias", False)
    has_mlp_bias = fields.flag("mlp_bias", False)
    if has_output_bias != has_mlp_bias or (has_output_bias and not has_qkv_bias):
        fields.refuse("attention_out_bias", "Megatron biases every linear layer or only q, k and v")
    return {"has_qkv_bias": has_qkv_bias, "has_linear_bias": has_output_bias and has_qkv_bias and has_mlp_bias}


def _write_biases(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    return {
        "attention_bias": model.has_qkv_bias,
        "attention_out_bias": model.has_linear_bias,
        "mlp_bias": model.has_linear_bias,
    }


SEED_OSS = Family(
    model_type="seed_oss",
    hf_classes=("SeedOssForCausalLM",),
    config=(
        *llama_config(default_head_dim=128, default_attention_dropout=0.1),
        number("residual_dropout", "dropout.hidden", 0.1),
        ConfigRow(_read_biases, _write_biases),
    ),
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: True,
    requirements=LLAMA_REQUIREMENTS,
)
