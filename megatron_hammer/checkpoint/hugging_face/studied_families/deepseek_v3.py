"""DeepSeek-V3: multi-latent attention before DeepSeek's experts, and layers that predict the token after the next.

transformers does not build the latter and counts them in num_nextn_predict_layers; without that field there is one.
Source: transformers.models.deepseek_v3; the publication is arXiv 2412.19437.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import always_off
from megatron_hammer.checkpoint.hugging_face.families.llama import llama_config
from megatron_hammer.checkpoint.hugging_face.families.mixtures.biased_router import (
    BIASED_CONSTANTS,
    BIASED_FIELDS,
    begin_dense,
    deepseek_router_config,
    share_experts,
)
from megatron_hammer.checkpoint.hugging_face.family import ConfigFamily
from megatron_hammer.checkpoint.hugging_face.studied_families.studied_rows import read_only, require_absent
from megatron_hammer.model.shape import LatentAttention


def _read_latent_attention(fields: HfFields) -> Mapping[str, Any]:
    heads = fields.count("num_attention_heads")
    if fields.query_groups(heads, may_be_absent=True) != heads:
        fields.refuse("num_key_value_heads", f"latent attention makes a key and a value for each of {heads} heads")
    has_query_rank = fields.has_value("q_lora_rank", 1536)
    latent = LatentAttention(
        q_lora_rank=fields.count("q_lora_rank", 1536) if has_query_rank else None,
        kv_lora_rank=fields.count("kv_lora_rank", 512),
        qk_head_dim=fields.count("qk_nope_head_dim", 128),
        qk_pos_emb_head_dim=fields.count("qk_rope_head_dim", 64),
        v_head_dim=fields.count("v_head_dim", 128),
    )
    # head_dim, which transformers writes, is qk_rope_head_dim.
    return {"latent_attention": latent, "kv_channels": None}


DEEPSEEK_V3 = ConfigFamily(
    model_type="deepseek_v3",
    hf_classes=("DeepseekV3ForCausalLM",),
    began_with_own_code=True,
    has_experts=True,
    config=(
        *llama_config(head_width=read_only(_read_latent_attention), may_lack_groups=True),
        # DeepSeek-V3.2 keeps the name of the class in some copies.
        read_only(lambda fields: require_absent(fields, "index_topk", "sparse attention is not counted")),
        always_off("attention_bias", "biases of the linears that compress are not counted"),
        *deepseek_router_config(is_renormalized=True),
        share_experts("n_shared_experts", 1),
        begin_dense(3),
        read_only(lambda fields: {"num_mtp_layers": fields.count_or_zero("num_nextn_predict_layers", 1)}),
    ),
    constants={**BIASED_CONSTANTS, "has_qk_norm": True},
    own_fields=BIASED_FIELDS | {"first_k_dense_replace", "num_nextn_predict_layers", "quantization_config"},
)
