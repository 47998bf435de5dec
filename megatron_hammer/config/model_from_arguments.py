"""The model and the layout that a namespace asks for, so that a preset with overrides is counted exactly.

Inverse of preset_arguments.py for the flags that change parameters or ranks. What Megatron derives when a flag is left
out is derived here by the same rule. Flags that change the model in a way that is not counted are refused by
flags.py, so every count stands for what is built. Pure; no torch, no megatron.
"""

import argparse
import math
from typing import Literal

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.shape import ModelShape, MoeShape, RopeScaling

ESSENTIALS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def list_missing_essentials(namespace: argparse.Namespace) -> list[str]:
    """Attributes without which there is no model to count."""
    return [name for name in ESSENTIALS if getattr(namespace, name) is None]


def build_model(namespace: argparse.Namespace, *, name: str = "custom") -> ModelShape:
    """The architecture; needs every attribute of ESSENTIALS."""
    heads = namespace.num_attention_heads
    ffn_hidden_size = namespace.ffn_hidden_size or default_ffn_hidden_size(namespace.hidden_size, namespace.swiglu)
    model = ModelShape(
        name=name,
        source="command line",
        num_layers=namespace.num_layers,
        hidden_size=namespace.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=namespace.num_query_groups if namespace.group_query_attention else heads,
        kv_channels=namespace.kv_channels
        or (None if namespace.hidden_size % heads else namespace.hidden_size // heads),
        vocab_size=namespace.vocab_size,
        max_position_embeddings=namespace.max_position_embeddings,
        normalization=namespace.normalization,
        norm_epsilon=namespace.layernorm_epsilon,
        activation=_select_activation(namespace),
        position_embedding_type="rope"
        if namespace.use_rotary_position_embeddings
        else namespace.position_embedding_type,
        rotary_base=namespace.rotary_base,
        has_linear_bias=namespace.add_bias_linear,
        has_qkv_bias=namespace.add_qkv_bias or namespace.add_bias_linear,
        has_tied_embeddings=not namespace.untie_embeddings_and_output_weights,
        has_embedding_norm=namespace.embedding_norm,
        init_method_std=namespace.init_method_std,
        moe=_build_moe(namespace, ffn_hidden_size),
        has_qk_norm=namespace.qk_layernorm,
        rope_scaling=RopeScaling(factor=namespace.rope_scaling_factor) if namespace.use_rope_scaling else None,
        rotary_seq_len_interpolation_factor=namespace.rotary_seq_len_interpolation_factor,
    )
    return model


def default_ffn_hidden_size(hidden_size: int, is_swiglu: bool) -> int:
    """Megatron's width of the MLP where --ffn-hidden-size is left out (megatron.training.arguments.validate_args)."""
    return int((4 * hidden_size * 2 / 3) / 64) * 64 if is_swiglu else 4 * hidden_size


def _select_activation(namespace: argparse.Namespace) -> Literal["swiglu", "gelu_tanh", "gelu_erf"]:
    """Megatron's fused bias-gelu computes the tanh approximation; without the fusion it is the exact gelu."""
    if namespace.swiglu:
        return "swiglu"
    return "gelu_tanh" if namespace.bias_gelu_fusion and namespace.add_bias_linear else "gelu_erf"


def _build_moe(namespace: argparse.Namespace, ffn_hidden_size: int) -> MoeShape | None:
    if not namespace.num_experts:
        return None
    coefficients = namespace.moe_aux_loss_coeff
    return MoeShape(
        num_experts=namespace.num_experts,
        router_topk=namespace.moe_router_topk,
        ffn_hidden_size=namespace.moe_ffn_hidden_size or ffn_hidden_size,
        shared_expert_intermediate_size=namespace.moe_shared_expert_intermediate_size or 0,
        has_shared_expert_gate=namespace.moe_shared_expert_gate,
        is_topk_renormalized=not namespace.moe_router_pre_softmax,
        aux_loss_coeff=coefficients[0] if isinstance(coefficients, list) else coefficients,
    )


def count_ranks_of_model(namespace: argparse.Namespace) -> int:
    """Ranks that hold one copy of the model between them: tp x pp x cp."""
    return (
        namespace.tensor_model_parallel_size * namespace.pipeline_model_parallel_size * namespace.context_parallel_size
    )


def count_least_world_size(namespace: argparse.Namespace) -> int:
    """The smallest world that the parallel sizes fit in: tp x pp x cp, widened until the experts tile a stage."""
    tp = namespace.tensor_model_parallel_size
    ranks_per_stage = tp * namespace.context_parallel_size
    expert_block = namespace.expert_model_parallel_size * (namespace.expert_tensor_parallel_size or tp)
    if min(ranks_per_stage, expert_block, namespace.pipeline_model_parallel_size) < 1:
        return 1  # preflight reports the size that is not positive
    return math.lcm(ranks_per_stage, expert_block) * namespace.pipeline_model_parallel_size


def virtual_size(namespace: argparse.Namespace) -> int:
    """Model chunks a stage, from either of Megatron's two flags; 1 without interleaving.

    --num-layers-per-virtual-pipeline-stage must divide the layers of a stage, which preflight checks.
    """
    if namespace.num_virtual_stages_per_pipeline_rank is not None:
        return namespace.num_virtual_stages_per_pipeline_rank
    if namespace.num_layers_per_virtual_pipeline_stage is None:
        return 1
    slots = namespace.num_layers
    slots += int(namespace.account_for_embedding_in_pipeline_split) + int(namespace.account_for_loss_in_pipeline_split)
    return slots // namespace.pipeline_model_parallel_size // namespace.num_layers_per_virtual_pipeline_stage


def build_layout(namespace: argparse.Namespace) -> ParallelLayout:
    """The layout, with as many data-parallel copies as fit in the world (at least one)."""
    return ParallelLayout(
        tensor_model_parallel_size=namespace.tensor_model_parallel_size,
        pipeline_model_parallel_size=namespace.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_size(namespace),
        context_parallel_size=namespace.context_parallel_size,
        data_parallel_size=max(1, namespace.world_size // count_ranks_of_model(namespace)),
        expert_model_parallel_size=namespace.expert_model_parallel_size,
        expert_tensor_parallel_size=namespace.expert_tensor_parallel_size,
        has_sequence_parallel=namespace.sequence_parallel and namespace.tensor_model_parallel_size > 1,
        has_distributed_optimizer=namespace.use_distributed_optimizer,
        num_layers_first_stage=namespace.decoder_first_pipeline_num_layers,
        num_layers_last_stage=namespace.decoder_last_pipeline_num_layers,
        accounts_for_embedding=namespace.account_for_embedding_in_pipeline_split,
        accounts_for_loss=namespace.account_for_loss_in_pipeline_split,
    )
