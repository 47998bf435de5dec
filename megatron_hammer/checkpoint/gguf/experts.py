"""Mixtures of experts in a GGUF file: all experts of a layer in one tensor, and the keys that describe the router.

Source: llama.cpp's src/llama-model.cpp (archs glm4moe and dots1) and its llm_graph_context::build_moe_ffn.
"""

import re
from collections.abc import Callable

import torch
from gguf import ExpertGatingFuncType, GGUFWriter
from torch import Tensor

from megatron_hammer.checkpoint.gguf.file_types import FileType
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, MoeShape

ROUTER = "ffn_gate_inp"  # the kind of its tensor, which is f32 in every file
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STACK = ".experts.*."
# Endings as the gguf package has them: it takes off only .weight and .bias.
_BIAS = re.compile(r"e_score_correction_bias$")


def name_stack(hf_name: str) -> str | None:
    """The name of the tensor of all experts, for the first of them; None for another expert; else the name itself."""
    expert = _EXPERT.search(hf_name)
    if expert is None:
        return hf_name
    return _EXPERT.sub(_STACK, hf_name) if int(expert[1]) == 0 else None


def spell_for_lookup(name: str) -> str:
    """A name of `name_stack` as the gguf package's table spells it."""
    return _BIAS.sub("e_score_correction.bias", name.replace(_STACK, ".experts."))


def is_stack(name: str) -> bool:
    return _STACK in name


def read_stacks(read: Callable[[str], Tensor], moe: MoeShape | None) -> Callable[[str], Tensor]:
    """`read` of a Hugging Face tensor by name, for the names of `name_stack` too: [experts, rows, columns]."""

    def read_any(name: str) -> Tensor:
        if moe is None or not is_stack(name):
            return read(name)
        return torch.stack([read(name.replace(_STACK, f".experts.{expert}.")) for expert in range(moe.num_experts)])

    return read_any


def require_writable_experts(model: ModelShape, file_type: FileType) -> None:
    """Raise ConversionError for what is not written: groups of experts, and k-quants, whose mixtures differ here."""
    moe = model.moe
    if moe is None:
        return
    problems = []
    if moe.num_groups is not None:
        problems.append(
            "config.json, n_group: must be 1, as in the published models of llama.cpp's arch, got "
            f"n_group={moe.num_groups}, topk_group={moe.group_topk}. Keep the Hugging Face folder."
        )
    if file_type.needs_llama_cpp:
        problems.append(
            f"type: must be f32, f16, bf16 or q8_0 for mixtures of experts, got {file_type.code.name}. "
            "Pass --type q8_0, or quantize the f16 file with llama-quantize."
        )
    if problems:
        raise ConversionError(*problems)


def describe_experts(writer: GGUFWriter, moe: MoeShape) -> None:
    """The keys of the router and the sizes of the experts; all dense layers are the first ones."""
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.router_topk)
    writer.add_expert_feed_forward_length(moe.ffn_hidden_size)
    writer.add_expert_shared_count(moe.shared_expert_intermediate_size // moe.ffn_hidden_size)
    writer.add_leading_dense_block_count(len(moe.dense_layers))
    writer.add_expert_weights_scale(moe.topk_scaling_factor)
    writer.add_expert_weights_norm(moe.is_topk_renormalized)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
