"""Solar Open: a GLM-4.5 whose layers all have experts, without norms on queries and keys."""

from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, flag
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.families.mixtures.biased_router import (
    BIASED_CONSTANTS,
    BIASED_FEATURES,
    BIASED_FIELDS,
    BIASED_REQUIREMENTS,
    GROUPS,
    deepseek_router_config,
    has_sigmoid_router,
    list_biased_tensors,
    share_experts,
)
from megatron_hammer.checkpoint.hugging_face.families.mixtures.glm4_moe import BIAS
from megatron_hammer.checkpoint.hugging_face.family import Family

# It has no dense layer, so its config.json no width of one.
_NO_WIDTH = ConfigRow(lambda fields: {"ffn_hidden_size": fields.count("moe_intermediate_size")}, lambda model, _: {})
SOLAR_OPEN = Family(
    model_type="solar_open",
    hf_classes=("SolarOpenForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(
            mlp_width=_NO_WIDTH,
            has_partial_rope=True,
            default_head_dim=128,
            default_rope_theta=1e6,
            default_epsilon=1e-5,
        ),
        flag("attention_bias", "has_qkv_bias", False),  # of q, k and v
        *deepseek_router_config(is_renormalized=True),
        share_experts("n_shared_experts", 1),
    ),
    constants=BIASED_CONSTANTS,
    features=BIASED_FEATURES | {GROUPS, "rotary_percent"},
    own_fields=BIASED_FIELDS | {"partial_rotary_factor"},
    list_tensors=lambda model: list_biased_tensors(model, bias=BIAS),
    is_candidate=has_sigmoid_router,
    requirements=BIASED_REQUIREMENTS,
)
