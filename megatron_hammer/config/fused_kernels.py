"""Which fused kernels a run uses by default: those that can only be faster, where they are known to be right.

docs/architecture.md lists them, with those that are left off and why.
"""

from collections.abc import Mapping
from typing import Any


def select_fused_kernels(
    arguments: Mapping[str, Any], typed: frozenset[str], *, platform: str, backend: str
) -> dict[str, bool]:
    """{attribute: whether it is on} of Megatron's flags of fused kernels and ours; a typed flag keeps its value."""
    chosen: dict[str, bool] = {}

    def choose(name: str, default: bool) -> bool:
        chosen[name] = arguments[name] if name in typed else default
        return chosen[name]

    has_kernels = choose("triton_kernels", platform == "cuda" and backend == "torch")
    is_packed_te = backend == "te" and arguments["is_sft"] and not arguments["sft_unpacked"]
    sizes = (arguments["micro_batch_size"], arguments["eval_micro_batch_size"] or arguments["micro_batch_size"])
    # Positions of packed conversations differ from sequence to sequence, and TransformerEngine's kernel has one angle
    # for all; its other kernel, which splits too, is refused by megatron beside boundaries.
    has_rope = choose("apply_rope_fusion", (backend == "te" or has_kernels) and not (is_packed_te and sizes != (1, 1)))
    chosen["fused_single_qkv_rope"] = has_rope and _can_fuse_split(arguments) and not is_packed_te
    is_plain_rms = arguments["normalization"] == "RMSNorm" and not arguments["layernorm_zero_centered_gamma"]
    choose("fused_residual_rmsnorm", has_kernels and is_plain_rms and not frees_norm_outputs(arguments))
    # Both FSDPs keep gradients in a way of their own. PyTorch has the product onto fp32 on GPUs alone.
    is_fsdp = arguments["use_torch_fsdp2"] or arguments["use_megatron_fsdp"]
    choose("gradient_accumulation_fusion", platform == "cuda" and not is_fsdp)
    return chosen


def _can_fuse_split(arguments: Mapping[str, Any]) -> bool:
    """Whether megatron may turn queries and keys as it splits them; it asserts some of these and forgets the others.

    It passes no `interleaved` to the kernel. Where several ranks share a query group, each would take all its queries.
    Norms on query and key come between the split and the turn. Layers without rotary embeddings, and a gate beside the
    query, have other splits.
    """
    is_rope = arguments["position_embedding_type"] == "rope" or arguments["use_rotary_position_embeddings"]
    num_groups = arguments["num_query_groups"] or arguments["num_attention_heads"] or 0
    others = (
        "rotary_interleaved",
        "qk_layernorm",
        "qk_l2_norm",
        "attention_output_gate",
        "no_rope_freq",
        "fine_grained_activation_offloading",
    )
    is_split_alone = not any(arguments[name] for name in others)
    return is_rope and num_groups >= arguments["tensor_model_parallel_size"] and is_split_alone


def frees_norm_outputs(arguments: Mapping[str, Any]) -> bool:
    """Whether --recompute-modules has a layer's norms: their outputs are then freed, and with them the residual.

    A norm that returns the residual returns its own input (CheckpointWithoutOutput frees every output of a module).
    """
    is_selective = arguments["recompute_granularity"] == "selective" or arguments["recompute_activations"]
    return bool(is_selective and "layernorm" in (arguments["recompute_modules"] or ()))
