"""Qwen3-MoE: a Qwen3 with experts in place of the MLP, none of them shared."""

from megatron_hammer.checkpoint.hugging_face.config_rows import always_off
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import MIXTURE_REQUIREMENTS, NO_QKV_BIAS
from megatron_hammer.checkpoint.hugging_face.families.mixtures.qwen2_moe import (
    DENSE_LAYERS,
    QWEN_FIELDS,
    QWEN_MIXTURE_CONFIG,
    list_qwen_mixture,
)
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.checkpoint.hugging_face.window_rows import IN_EVERY_LAYER, WINDOW, switched_window_in_every_layer

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(),
        *QWEN_MIXTURE_CONFIG,
        switched_window_in_every_layer(),
        always_off("attention_bias", "a bias on o_proj without one on the experts is not mapped"),
    ),
    constants={"has_qk_norm": True},
    own_fields=QWEN_FIELDS,
    list_tensors=lambda model: list_qwen_mixture(model, has_shared_expert=False),
    is_candidate=lambda model: model.moe is not None and model.has_qk_norm,
    features=WINDOW | {DENSE_LAYERS},
    requirements=(*MIXTURE_REQUIREMENTS, NO_QKV_BIAS, IN_EVERY_LAYER),
)
