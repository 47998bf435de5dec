"""Qwen2: a Llama with biases on q, k and v."""

from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA_REQUIREMENTS, list_llama_tensors, llama_config
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.checkpoint.hugging_face.window_rows import (
    LAYER_TYPES,
    WINDOW,
    last_layers,
    switched_window_in_chosen_layers,
)

DENSE_WINDOW = switched_window_in_chosen_layers(last_layers, default=4096)

QWEN2 = Family(
    model_type="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    config=(*llama_config(), DENSE_WINDOW),
    constants={"has_qkv_bias": True},
    list_tensors=list_llama_tensors,
    # LlamaConfig's attention_bias would bias o_proj too.
    is_candidate=lambda model: model.has_qkv_bias and not model.has_linear_bias,
    features=WINDOW,
    own_fields=LAYER_TYPES,
    requirements=LLAMA_REQUIREMENTS,
)
