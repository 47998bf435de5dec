"""GLM-4.5: DeepSeek-V3's router behind an attention that turns a share of each head and may have norms and biases."""

from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, flag
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
from megatron_hammer.checkpoint.hugging_face.family import Family

BIAS = "mlp.gate.e_score_correction_bias"
GLM4_MOE = Family(
    model_type="glm4_moe",
    hf_classes=("Glm4MoeForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(has_partial_rope=True, default_rotary_percent=0.5, default_epsilon=1e-5),
        flag("attention_bias", "has_qkv_bias", False),  # of q, k and v
        flag("use_qk_norm", "has_qk_norm", False),
        *deepseek_router_config(is_renormalized=True),
        share_experts("n_shared_experts", 1),
        begin_dense(1),
        # Layers that predict the token after the next lie behind the model's own; tensor_sources.py leaves them out.
        ConfigRow(lambda fields: {}, lambda model, _: {"num_nextn_predict_layers": 0}),
    ),
    constants=BIASED_CONSTANTS,
    features=BIASED_FEATURES | {GROUPS, DENSE_LAYERS, "rotary_percent", "has_qk_norm"},
    own_fields=BIASED_FIELDS
    | {"first_k_dense_replace", "partial_rotary_factor", "use_qk_norm", "num_nextn_predict_layers"},
    list_tensors=lambda model: list_biased_tensors(model, bias=BIAS),
    is_candidate=has_sigmoid_router,
    requirements=(*BIASED_REQUIREMENTS, DENSE_FIRST),
)
