"""Qwen3: a Llama with a norm on every head's query and key."""

from megatron_hammer.checkpoint.hugging_face.config_rows import always_off
from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA_REQUIREMENTS, list_llama_tensors, llama_config
from megatron_hammer.checkpoint.hugging_face.families.qwen2 import DENSE_WINDOW
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.window_rows import LAYER_TYPES, WINDOW

QWEN3 = Family(
    model_type="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    config=(
        # Qwen3Config sets head_dim to 128 whatever hidden_size is.
        *llama_config(default_head_dim=128),
        DENSE_WINDOW,
        always_off("attention_bias", "a bias on o_proj without one on the MLP is not mapped"),
    ),
    constants={"has_qk_norm": True},
    list_tensors=list_llama_tensors,
    is_candidate=lambda model: model.has_qk_norm,
    features=WINDOW,
    own_fields=LAYER_TYPES,
    requirements=(
        *LLAMA_REQUIREMENTS,
        Requirement(
            lambda model: not model.has_qkv_bias,
            "qk_layernorm=True with a bias",
            "Qwen3 has none, or one on o_proj too",
        ),
    ),
)
