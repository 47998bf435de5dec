"""Helium: a Llama that turns neighbouring rows of a head together, where all other classes turn its two halves.

The rows of q and k are put in another order for Megatron, whose kernels then serve it as any Llama.
"""

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import always_off, flag, unwritten
from megatron_hammer.checkpoint.hugging_face.families.llama import LLAMA_REQUIREMENTS, list_llama_tensors, llama_config
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import NEIGHBOURS_QKV


def _require_filled_heads(fields: HfFields) -> None:
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if fields.head_dim(hidden_size, heads, default=128) * heads != hidden_size:
        fields.refuse("head_dim", f"HeliumAttention wants heads that fill hidden_size={hidden_size}")


HELIUM = Family(
    model_type="helium",
    hf_classes=("HeliumForCausalLM",),
    config=(
        *llama_config(default_head_dim=128, default_rope_theta=1e5, default_epsilon=1e-8),
        unwritten(_require_filled_heads),
        flag("attention_bias", "has_qkv_bias", False),
        always_off("mlp_bias", "a bias on the MLP without one on o_proj is not mapped"),
    ),
    list_tensors=lambda model: list_llama_tensors(model, qkv_layout=NEIGHBOURS_QKV),
    is_candidate=lambda model: not model.has_linear_bias,
    requirements=(
        *LLAMA_REQUIREMENTS,
        Requirement(
            lambda model: model.kv_channels is None,
            lambda model: f"kv_channels={model.head_dim}",
            "Helium's heads fill hidden_size exactly",
        ),
    ),
)
