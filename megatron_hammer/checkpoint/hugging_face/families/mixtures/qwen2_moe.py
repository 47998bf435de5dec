"""Qwen2-MoE: a Qwen2 with experts in place of the MLP, one of them shared by all tokens; and what Qwen3-MoE shares."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import (
    ConfigRow,
    Dropout,
    count,
    flag,
    number,
    write_value,
)
from megatron_hammer.checkpoint.hugging_face.families.llama import (
    DENSE_MLP,
    HF_LAYER,
    LAYER,
    list_llama_tensors,
    llama_config,
)
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import MIXTURE_REQUIREMENTS
from megatron_hammer.checkpoint.hugging_face.family import Family, Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorRow, build_rows, mark_rows
from megatron_hammer.checkpoint.hugging_face.window_rows import LAYER_TYPES, WINDOW, switched_window_in_chosen_layers
from megatron_hammer.model.shape import ModelShape

_EXPERT, _HF_EXPERT = LAYER + "mlp.experts.experts.{expert}.", HF_LAYER + "mlp.experts.{expert}."
_SHARED, _HF_SHARED = LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_expert"
QWEN_EXPERTS = build_rows(
    (LAYER + "pre_mlp_layernorm.weight", "h", HF_LAYER + "post_attention_layernorm.weight"),
    (_EXPERT + "linear_fc1.weight", "2m h", _HF_EXPERT + "<gate|up>_proj.weight", GATE_UP),
    (_EXPERT + "linear_fc2.weight", "h m", _HF_EXPERT + "down_proj.weight"),
)
_ROUTER = build_rows((LAYER + "mlp.router.weight", "e h", HF_LAYER + "mlp.gate.weight"))
_SHARED_EXPERT = build_rows(
    (_SHARED + "linear_fc1.weight", "2s h", _HF_SHARED + ".<gate|up>_proj.weight", GATE_UP),
    (_SHARED + "linear_fc2.weight", "h s", _HF_SHARED + ".down_proj.weight"),
    # A linear layer with one output in both. Megatron keeps it as a bare parameter [1, h].
    (_SHARED + "gate_weight", "1 h", _HF_SHARED + "_gate.weight"),
)


def list_qwen_mixture(model: ModelShape, *, has_shared_expert: bool) -> tuple[TensorRow, ...]:
    """The rows of a model whose layers have experts or, where they are in mlp_only_layers, an MLP."""
    experts = (*_ROUTER, *QWEN_EXPERTS, *(_SHARED_EXPERT if has_shared_expert else ()))
    return list_llama_tensors(model, (*DENSE_MLP, *mark_rows(experts, layers="mixture")))


def _read_dense_layers(fields: HfFields) -> Mapping[str, Any]:
    """decoder_sparse_step N: experts in every N-th layer, the N-th the first; never in mlp_only_layers."""
    layers, step = fields.layers(), fields.count("decoder_sparse_step", default=1)
    only = set(fields.numbers("mlp_only_layers"))
    dense_layers = tuple(layer for layer in layers if layer in only or (layer + 1) % step)
    if len(dense_layers) == len(layers):
        fields.refuse("mlp_only_layers", f"with decoder_sparse_step={step} no layer would have experts")
    return {"moe.dense_layers": dense_layers}


def _write_dense_layers(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    dense_layers = model.moe.dense_layers if model.moe else ()
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(dense_layers)}


DENSE_LAYERS = "moe.dense_layers"
QWEN_FIELDS = frozenset({"decoder_sparse_step", "mlp_only_layers"})
QWEN_MIXTURE_CONFIG = (
    ConfigRow(_read_dense_layers, _write_dense_layers),
    ConfigRow(lambda fields: {"moe.num_experts": fields.num_experts()}, write_value("num_experts", "moe.num_experts")),
    count("num_experts_per_tok", "moe.router_topk"),
    # A softmax over the chosen logits is one over all of them, renormalised.
    flag("norm_topk_prob", "moe.is_topk_renormalized", False),
    count("moe_intermediate_size", "moe.ffn_hidden_size"),
    number("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001),
)


def _every_second_layer(fields: HfFields) -> Iterable[int]:
    """The first, the third and so on, up to max_window_layers."""
    return range(0, min(fields.count_or_zero("max_window_layers", 28), fields.count("num_hidden_layers")), 2)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    hf_classes=("Qwen2MoeForCausalLM",),
    has_experts=True,
    config=(
        *llama_config(),
        *QWEN_MIXTURE_CONFIG,
        count("shared_expert_intermediate_size", "moe.shared_expert_intermediate_size"),
        # Unlike Qwen2, whose biases are fixed in its code, this class has a switch.
        flag("qkv_bias", "has_qkv_bias", True),
        switched_window_in_chosen_layers(_every_second_layer, default=4096),
    ),
    constants={"moe.has_shared_expert_gate": True},
    features=WINDOW | {DENSE_LAYERS},
    own_fields=LAYER_TYPES | QWEN_FIELDS,
    list_tensors=lambda model: list_qwen_mixture(model, has_shared_expert=True),
    is_candidate=lambda model: model.moe is not None and model.moe.shared_expert_intermediate_size > 0,
    requirements=(
        *MIXTURE_REQUIREMENTS,
        Requirement(
            lambda model: model.moe is not None and model.moe.has_shared_expert_gate,
            "a shared expert without its gate",
            "Qwen2-MoE, which has one, scales it by a gate",
        ),
        Requirement(
            lambda model: not model.has_qk_norm,
            "qk_layernorm=True with a shared expert",
            "Qwen3-MoE has none and Qwen2-MoE no such norm",
        ),
    ),
)
