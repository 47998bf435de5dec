"""Mixtral: a Mistral with experts in place of the MLP. Its router's softmax goes over the chosen experts."""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, count, number, write_value
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    HF_LAYER,
    LAYER,
    LLAMA_REQUIREMENTS,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP
from megatron_hammer.checkpoint.hugging_face.tensor_rows import build_rows
from megatron_hammer.checkpoint.hugging_face.window_rows import IN_EVERY_LAYER, WINDOW, window_in_every_layer

_EXPERTS, _HF_MIXTURE = LAYER + "mlp.experts.experts.{expert}.", HF_LAYER + "block_sparse_moe."
_MIXTURE = build_rows(
    (LAYER + "pre_mlp_layernorm.weight", "h", HF_LAYER + "post_attention_layernorm.weight"),
    (LAYER + "mlp.router.weight", "e h", _HF_MIXTURE + "gate.weight"),
    (_EXPERTS + "linear_fc1.weight", "2m h", _HF_MIXTURE + "experts.{expert}.<w1|w3>.weight", GATE_UP),
    (_EXPERTS + "linear_fc2.weight", "h m", _HF_MIXTURE + "experts.{expert}.w2.weight"),
)


def _read_width(fields: HfFields) -> Mapping[str, Any]:
    """Its MLPs are the experts, so intermediate_size is theirs."""
    width = fields.count("intermediate_size")
    return {"ffn_hidden_size": width, "moe.ffn_hidden_size": width}


# Of every class with experts.
MIXTURE_REQUIREMENTS = (
    *LLAMA_REQUIREMENTS,
    Requirement(
        lambda model: not model.has_linear_bias,
        "experts with add_bias_linear=True",
        "no class with experts biases more than q, k and v",
    ),
)
NO_QKV_BIAS = Requirement(
    lambda model: not model.has_qkv_bias,
    "experts with a QKV bias and no shared expert",
    "only Qwen2-MoE, which has one, biases them",
)
MIXTRAL = Family(
    model_type="mixtral",
    hf_classes=("MixtralForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(
            mlp_width=ConfigRow(_read_width, write_value("intermediate_size", "moe.ffn_hidden_size")),
            # MixtralConfig's own defaults; the other classes have 10000 and 1e-6.
            default_rope_theta=1e6,
            default_epsilon=1e-5,
        ),
        # MixtralConfig has no window by default, unlike MistralConfig.
        window_in_every_layer(default=None),
        ConfigRow(
            lambda fields: {"moe.num_experts": fields.num_experts()},
            write_value("num_local_experts", "moe.num_experts"),
        ),
        count("num_experts_per_tok", "moe.router_topk"),
        number("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001),
    ),
    # Softmax over the chosen logits equals softmax over all of them, divided by the sum over the chosen. Megatron does
    # the first without --moe-router-pre-softmax.
    constants={"moe.is_topk_renormalized": True},
    list_tensors=lambda model: list_llama_tensors(model, _MIXTURE),
    is_candidate=lambda model: model.moe is not None,
    features=WINDOW,
    requirements=(
        *MIXTURE_REQUIREMENTS,
        NO_QKV_BIAS,
        IN_EVERY_LAYER,
        Requirement(
            lambda model: model.moe is not None and model.moe.is_topk_renormalized,
            "experts with moe_router_pre_softmax=True, no shared one and no norm on queries and keys",
            "Mixtral's weights of the chosen experts sum to one",
        ),
    ),
)
