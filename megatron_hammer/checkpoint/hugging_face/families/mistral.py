"""Mistral: a Llama whose heads need not fill hidden_size, and whose layers may have a sliding window; and Ministral."""

from megatron_hammer.checkpoint.hugging_face.families.llama import (
    LLAMA_REQUIREMENTS,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.checkpoint.hugging_face.window_rows import (
    IN_EVERY_LAYER,
    LAYER_TYPES,
    WINDOW,
    window_in_chosen_layers,
    window_in_every_layer,
)

MISTRAL = Family(
    model_type="mistral",
    hf_classes=("MistralForCausalLM",),
    config=(
        *llama_config(),
        # MistralConfig has a window of 4096 by default, so null must be written, and an absent field means 4096.
        window_in_every_layer(default=4096),
    ),
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: not model.has_qkv_bias,
    features=WINDOW,
    requirements=(*LLAMA_REQUIREMENTS, IN_EVERY_LAYER),
)

# A Mistral in which some layers have the window and the others see everything.
MINISTRAL = Family(
    model_type="ministral",
    hf_classes=("MinistralForCausalLM",),
    config=(*llama_config(), window_in_chosen_layers(default=4096)),
    features=WINDOW,
    own_fields=LAYER_TYPES,
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: not model.has_qkv_bias and model.sliding_window is not None,
    requirements=LLAMA_REQUIREMENTS,
)
