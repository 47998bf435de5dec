"""dots.llm1: DeepSeek-V3's router behind Qwen3's attention."""

from collections.abc import Iterable

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import always_off
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.families.mixtures.biased_router import (
    BIASED_CONSTANTS,
    BIASED_FEATURES,
    BIASED_FIELDS,
    BIASED_REQUIREMENTS,
    DENSE_FIRST,
    DENSE_LAYERS,
    GROUPS,
    begin_dense,
    deepseek_router_config,
    has_sigmoid_router,
    list_biased_tensors,
    share_experts,
)
from megatron_hammer.checkpoint.hugging_face.families.mixtures.glm4_moe import BIAS
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import NO_QKV_BIAS
from megatron_hammer.checkpoint.hugging_face.family import Family
from megatron_hammer.checkpoint.hugging_face.window_rows import LAYER_TYPES, WINDOW, window_in_chosen_layers


def _default_layers(fields: HfFields) -> Iterable[int]:
    """Those from max_window_layers on."""
    return range(fields.count_or_zero("max_window_layers", 62), len(fields.layers()))


DOTS1 = Family(
    model_type="dots1",
    hf_classes=("Dots1ForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(),
        always_off("attention_bias", "a bias on o_proj without one on the experts is not mapped"),
        window_in_chosen_layers(_default_layers, default=4096),
        *deepseek_router_config(is_renormalized=False),
        share_experts("n_shared_experts"),
        begin_dense(0),
    ),
    constants={**BIASED_CONSTANTS, "has_qk_norm": True},
    features=BIASED_FEATURES | WINDOW | {GROUPS, DENSE_LAYERS},
    own_fields=BIASED_FIELDS | LAYER_TYPES | {"first_k_dense_replace"},
    list_tensors=lambda model: list_biased_tensors(model, bias=BIAS),
    is_candidate=has_sigmoid_router,
    requirements=(*BIASED_REQUIREMENTS, DENSE_FIRST, NO_QKV_BIAS),
)
