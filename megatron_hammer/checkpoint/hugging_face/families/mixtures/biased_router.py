"""What the classes with DeepSeek-V3's router share: sigmoid scores, a bias for the choice alone, a shared expert.

The bias is moved in training by the load of the experts (arXiv 2408.15664) and kept in fp32 in both formats.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_fields import HfFields
from megatron_hammer.checkpoint.hugging_face.config_rows import ConfigRow, Dropout, count, flag, number, unwritten
from megatron_hammer.checkpoint.hugging_face.families.llama import DENSE_MLP, HF_LAYER, LAYER, list_llama_tensors
from megatron_hammer.checkpoint.hugging_face.families.mixtures.mixtral import MIXTURE_REQUIREMENTS
from megatron_hammer.checkpoint.hugging_face.families.mixtures.qwen2_moe import QWEN_EXPERTS
from megatron_hammer.checkpoint.hugging_face.family import Requirement
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorRow, build_rows, mark_rows
from megatron_hammer.model.shape import ModelShape, MoeShape

# --- config.json -----------------------------------------------------------------------------------------------------


def share_experts(name: str, default: int | None = None) -> ConfigRow:
    """The shared expert, as wide as so many routed ones; `name` is that number, `default` of an absent one."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        return {"moe.shared_expert_intermediate_size": fields.count(name, default) * _read_width(fields)}

    def write(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
        moe = _moe_of(model)
        return {name: moe.shared_expert_intermediate_size // moe.ffn_hidden_size}

    return ConfigRow(read, write)


def _read_width(fields: HfFields) -> int:
    return fields.count("moe_intermediate_size")


def _read_groups(fields: HfFields) -> Mapping[str, Any]:
    """Groups that are all chosen limit nothing."""
    num_groups, group_topk = fields.count("n_group", default=1), fields.count("topk_group", default=1)
    if num_groups == group_topk:
        return {}
    experts, topk = fields.count("n_routed_experts"), fields.count("num_experts_per_tok")
    if group_topk > num_groups or experts % num_groups or topk > group_topk * (experts // num_groups):
        fields.refuse("topk_group", f"of {num_groups} groups of {experts} experts, {topk} experts cannot be chosen so")
    elif topk // group_topk != BEST_OF_GROUP or experts // num_groups < BEST_OF_GROUP:
        fields.refuse(
            "topk_group",
            f"the class scores a group by its {BEST_OF_GROUP} best experts, Megatron by num_experts_per_tok // "
            f"topk_group = {topk // group_topk}",
        )
    return {"moe.num_groups": num_groups, "moe.group_topk": group_topk}


def _write_groups(model: ModelShape, _: Dropout) -> Mapping[str, Any]:
    moe = _moe_of(model)
    return {"n_group": moe.num_groups or 1, "topk_group": moe.group_topk or 1}


def begin_dense(default: int) -> ConfigRow:
    """first_k_dense_replace: how many layers are dense before the first mixture; `default` of an absent one."""

    def read(fields: HfFields) -> Mapping[str, Any]:
        num_dense, layers = fields.count_or_zero("first_k_dense_replace", default), fields.layers()
        if num_dense >= len(layers):
            fields.refuse("first_k_dense_replace", f"none of {len(layers)} layers would have experts")
        return {"moe.dense_layers": tuple(layers[:num_dense])}

    return ConfigRow(read, lambda model, _: {"first_k_dense_replace": len(_moe_of(model).dense_layers)})


def deepseek_router_config(*, is_renormalized: bool) -> tuple[ConfigRow, ...]:
    """The fields of DeepSeek-V3's own spelling; is_renormalized: the class's default of norm_topk_prob."""
    return (
        count("n_routed_experts", "moe.num_experts"),
        count("num_experts_per_tok", "moe.router_topk"),
        count("moe_intermediate_size", "moe.ffn_hidden_size"),
        flag("norm_topk_prob", "moe.is_topk_renormalized", is_renormalized),
        number("routed_scaling_factor", "moe.topk_scaling_factor", 1.0),
        ConfigRow(_read_groups, _write_groups),
        # No class reads it; dots.llm1 has the name of the whole method there.
        unwritten(lambda fields: fields.require_choice("scoring_func", ("sigmoid", "noaux_tc"), default="sigmoid")),
    )


# --- tensors ---------------------------------------------------------------------------------------------------------


def list_biased_tensors(
    model: ModelShape, *, router: str = "mlp.gate.weight", bias: str, shared: str = "mlp.shared_experts"
) -> tuple[TensorRow, ...]:
    """The rows of a model with this router; the names are those of the tensors of a layer in the folder."""
    weights = build_rows(
        (LAYER + "mlp.router.weight", "e h", HF_LAYER + router),
        (LAYER + "mlp.shared_experts.linear_fc1.weight", "2s h", HF_LAYER + shared + ".<gate|up>_proj.weight", GATE_UP),
        (LAYER + "mlp.shared_experts.linear_fc2.weight", "h s", HF_LAYER + shared + ".down_proj.weight"),
    )
    buffer = mark_rows(build_rows((LAYER + "mlp.router.expert_bias", "e", HF_LAYER + bias)), is_buffer=True)
    return list_llama_tensors(model, (*DENSE_MLP, *mark_rows((*QWEN_EXPERTS, *weights, *buffer), layers="mixture")))


# --- which models ----------------------------------------------------------------------------------------------------

BEST_OF_GROUP = 2  # experts of a group whose scores are the group's, in every class of transformers
# The classes have no loss for an even load: the bias sees to that.
BIASED_CONSTANTS = {"moe.score_function": "sigmoid", "moe.has_expert_bias": True, "moe.aux_loss_coeff": 0.0}
BIASED_FEATURES = frozenset({"moe.score_function", "moe.has_expert_bias", "moe.topk_scaling_factor"})
GROUPS = "moe.num_groups"
DENSE_LAYERS = "moe.dense_layers"
BIASED_FIELDS = frozenset({"scoring_func", "routed_scaling_factor", "n_group", "n_shared_experts"})


def has_sigmoid_router(model: ModelShape) -> bool:
    return model.moe is not None and model.moe.score_function == "sigmoid"


def _moe_of(model: ModelShape) -> MoeShape:
    assert model.moe is not None
    return model.moe


def begins_dense(model: ModelShape) -> bool:
    """Whether the dense layers, if any, are the first ones."""
    dense_layers = _moe_of(model).dense_layers
    return dense_layers == tuple(range(len(dense_layers)))


def _scores_groups_alike(moe: MoeShape) -> bool:
    return moe.group_topk is None or moe.router_topk // moe.group_topk == BEST_OF_GROUP


BIASED_REQUIREMENTS = (
    *MIXTURE_REQUIREMENTS,
    Requirement(
        lambda model: _moe_of(model).has_expert_bias,
        "moe_router_score_function=sigmoid without moe_router_enable_expert_bias",
        "every class with sigmoid scores has the bias",
    ),
    Requirement(
        lambda model: (
            not _moe_of(model).has_shared_expert_gate
            and _moe_of(model).shared_expert_intermediate_size > 0
            and _moe_of(model).shared_expert_intermediate_size % _moe_of(model).ffn_hidden_size == 0
        ),
        lambda model: (
            f"moe_shared_expert_intermediate_size={_moe_of(model).shared_expert_intermediate_size} with "
            f"moe_ffn_hidden_size={_moe_of(model).ffn_hidden_size} and "
            f"moe_shared_expert_gate={_moe_of(model).has_shared_expert_gate}"
        ),
        "the shared expert of these classes is as wide as one or more of the others, and has no gate",
    ),
    Requirement(
        lambda model: _scores_groups_alike(_moe_of(model)),
        lambda model: f"moe_router_topk={_moe_of(model).router_topk} of {_moe_of(model).group_topk} groups",
        "the classes score a group by its 2 best experts, Megatron by moe_router_topk // moe_router_group_topk",
    ),
)
DENSE_FIRST = Requirement(
    begins_dense,
    lambda model: f"dense layers {', '.join(map(str, _moe_of(model).dense_layers))}",
    "the dense layers of the class are the first ones",
)
