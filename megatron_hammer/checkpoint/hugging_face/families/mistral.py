"""Mistral: a Llama whose heads need not fill hidden_size. Its sliding window must hold the longest sequence."""

from megatron_hammer.checkpoint.hugging_face.config_rows import fixed
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    LLAMA_REQUIREMENTS,
    has_whole_heads,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family

MISTRAL = Family(
    model_type="mistral",
    hf_classes=("MistralForCausalLM",),
    config=(
        *llama_config(),
        # MistralConfig has a window of 4096 by default, so null must be written, and an absent field means 4096.
        fixed("sliding_window", None, lambda fields: fields.require_no_window(default=4096)),
    ),
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: not has_whole_heads(model) and not model.has_qkv_bias,
    requirements=LLAMA_REQUIREMENTS,
)
