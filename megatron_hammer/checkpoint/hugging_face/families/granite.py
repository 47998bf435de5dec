"""Granite: a Llama that multiplies its embeddings, attention scores, residual branches and logits by four numbers.

A run of Megatron's --use-mup computes the same function, without a multiplier of the residual branches.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, Dropout, multiplier
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    BIASES,
    LLAMA_REQUIREMENTS,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.model.shape import ModelShape, shorten_attention_scale


def _read_attention_scale(fields: HfFields) -> Mapping[str, Any]:
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = fields.head_dim(hidden_size, heads)
    # GraniteConfig's default is 1, and not the usual scale.
    return {"attention_scale": shorten_attention_scale(fields.multiplier("attention_multiplier"), head_dim)}


def _write_attention_scale(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    return {"attention_multiplier": model.attention_scale or model.head_dim**-0.5}


def find_divisor(multiplier: float) -> float:
    """The number with the fewest digits whose reciprocal is `multiplier`, so that a divisor read comes back as it was.

    1 / (1 / x) is not always x. Returns the rounded reciprocal where no number has exactly this one.
    """
    rounded = (float(f"{1 / multiplier:.{digits}g}") for digits in range(1, 18))
    return next((divisor for divisor in rounded if 1 / divisor == multiplier), 1 / multiplier)


GRANITE = Family(
    model_type="granite",
    hf_classes=("GraniteForCausalLM",),
    config=(
        *llama_config(may_lack_groups=True),
        BIASES,
        multiplier("embedding_multiplier", "embedding_multiplier"),
        ConfigRow(_read_attention_scale, _write_attention_scale),
        multiplier("residual_multiplier", "residual_multiplier"),
        ConfigRow(  # transformers divides the logits, Megatron multiplies them
            lambda fields: {"logits_multiplier": 1 / fields.multiplier("logits_scaling")},
            lambda model, _: {"logits_scaling": find_divisor(model.logits_multiplier)},
        ),
    ),
    features=frozenset({"embedding_multiplier", "attention_scale", "residual_multiplier", "logits_multiplier"}),
    own_fields=frozenset({"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}),
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: model.has_linear_bias or not model.has_qkv_bias,
    requirements=LLAMA_REQUIREMENTS,
)
