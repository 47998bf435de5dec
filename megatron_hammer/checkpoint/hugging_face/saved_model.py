"""The model of a checkpoint, from the arguments that it saved, if Hugging Face can express it.

config/model_arguments.py reads the arguments. An argument that changes the computation in a way that no mapping
expresses is refused here, all at once. Pure: imports neither torch nor megatron.
"""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, RopeScaling

_RANKED_OTHERWISE = {"sinkhorn", "quantile_balancing"}  # load balancing that is part of the choice of experts
# Argument: (the values that the mapping expresses, why no other is). Absent arguments count as unset.
_EXPRESSIBLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "normalization": (lambda value: value in ("RMSNorm", "LayerNorm"), "only RMSNorm and LayerNorm are mapped"),
    "position_embedding_type": (lambda value: value in ("rope", "learned_absolute"), "no mapping has another"),
    "rotary_percent": (lambda value: value in (None, 1.0), "Llama rotates every dimension of a head"),
    "rotary_interleaved": (lambda value: not value, "transformers rotates halves, not neighbouring pairs"),
    "rotary_scaling_factor": (lambda value: value in (None, 1.0), "only MLA models have it"),
    "no_rope_freq": (lambda value: not value, "every layer must have the same position embedding"),
    "qk_l2_norm": (lambda value: not value, "a norm without weights on queries and keys is not mapped"),
    "multi_latent_attention": (lambda value: not value, "multi-latent attention is not mapped"),
    "attention_output_gate": (lambda value: not value, "a gate on the attention output is not mapped"),
    "experimental_attention_variant": (lambda value: not value, "the attention variant is not mapped"),
    "softmax_type": (lambda value: value in (None, "vanilla"), "transformers' Llama has the plain softmax"),
    "window_size": (lambda value: not value, "sliding-window attention is not mapped"),
    "layernorm_zero_centered_gamma": (lambda value: not value, "norm weights would need + 1"),
    "apply_residual_connection_post_layernorm": (lambda value: not value, "no mapping has that residual"),
    "squared_relu": (lambda value: not value, "the activation is not mapped"),
    "quick_geglu": (lambda value: not value, "the activation is not mapped"),
    "openai_gelu": (lambda value: not value, "the activation is not mapped"),
    "activation_func_clamp_value": (lambda value: value is None, "a clamped activation is not mapped"),
    "glu_linear_offset": (lambda value: not value, "a shifted gate is not mapped"),
    "mtp_num_layers": (lambda value: not value, "multi-token prediction layers are not mapped"),
    "hybrid_layer_pattern": (lambda value: not value, "hybrid models are not mapped"),
    "is_hybrid_model": (lambda value: not value, "hybrid models are not mapped"),
    "linear_attention_freq": (lambda value: not value, "linear attention is not mapped"),
    "heterogeneous_layers_config_path": (lambda value: not value, "heterogeneous layers are not mapped"),
    "heterogeneous_layers_config_encoded_json": (lambda value: not value, "heterogeneous layers are not mapped"),
    "use_mup": (lambda value: not value, "muP's multipliers are not mapped"),
    "moe_router_score_function": (lambda value: value in (None, "softmax"), "the router must use softmax"),
    "moe_router_topk_scaling_factor": (lambda value: value in (None, 1.0), "scaled router weights are not mapped"),
    "moe_router_load_balancing_type": (
        lambda value: not _RANKED_OTHERWISE & set([value] if isinstance(value, str) else value or []),
        "the router must choose the largest scores",
    ),
    "moe_router_force_load_balancing": (lambda value: not value, "its router chooses at random"),
    "moe_router_force_biased": (lambda value: value is None, "its router chooses at random"),
    "moe_router_num_groups": (lambda value: not value, "group-limited routing is not mapped"),
    "moe_router_enable_expert_bias": (lambda value: not value, "the router's expert bias is not mapped"),
    "moe_latent_size": (lambda value: not value, "latent experts are not mapped"),
    "moe_apply_probs_on_input": (lambda value: not value, "transformers weights the experts' outputs"),
    "moe_mlp_glu_interleave_size": (lambda value: value is None, "interleaved rows of gate and up are not mapped"),
    "moe_shared_expert_glu_interleave_size": (
        lambda value: value is None,
        "interleaved rows of gate and up are not mapped",
    ),
    "moe_expert_rank_capacity_factor": (lambda value: value is None, "transformers drops no token"),
    "moe_expert_capacity_factor": (lambda value: value is None, "transformers drops no token"),
}


def read_saved_model(args: Any, *, vocab_size: int | None = None) -> ModelShape:
    """The model in Megatron's saved arguments; `vocab_size` replaces theirs (before padding).

    Raises ConversionError with one sentence for every argument that no mapping expresses.
    """
    _validate_expressible(args)
    # padded_vocab_size last: with it the rows of padding become tokens of the exported model.
    vocab_size = vocab_size or getattr(args, "vocab_size", None) or getattr(args, "padded_vocab_size", None)
    if vocab_size is None:
        raise ConversionError("vocab_size: the checkpoint's arguments must hold it, got none. Pass --vocab-size.")
    _validate_rope(args)
    if getattr(args, "num_experts", None):
        _validate_experts(args)
    completed = argparse.Namespace(**{**vars(args), "vocab_size": vocab_size})
    return read_model(completed, source="saved arguments")


def read_saved_dropout(args: Any) -> Dropout:
    """The dropout that the model was trained with."""
    return Dropout(attention=args.attention_dropout, hidden=args.hidden_dropout)


def _validate_expressible(args: Any) -> None:
    problems = [
        f"{name}: cannot be exported, got {name}={getattr(args, name)!r}: {reason}. "
        "Keep the checkpoint in Megatron's format."
        for name, (is_expressible, reason) in _EXPRESSIBLE.items()
        if hasattr(args, name) and not is_expressible(getattr(args, name))
    ]
    if problems:
        raise ConversionError(*problems)


def _validate_rope(args: Any) -> None:
    """Our training builds with the factor that was asked for; Megatron's own (gpt_config_from_args) always with 8."""
    if not getattr(args, "use_rope_scaling", False):
        return
    factor, default = getattr(args, "rope_scaling_factor", RopeScaling().factor), RopeScaling().factor
    # Only this package has --embedding-norm, so its saved name tells who trained the model.
    is_ours = hasattr(args, "embedding_norm")
    if factor != default and not is_ours:
        raise ConversionError(
            f"rope_scaling_factor: must be {default:g}, with which Megatron-LM builds whatever is asked for, got "
            f"rope_scaling_factor={factor:g}. Load and save it once with --rope-scaling-factor and what it was "
            "trained with."
        )
    interpolation_factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if interpolation_factor is not None:
        raise ConversionError(
            "rotary_seq_len_interpolation_factor: cannot be exported together with use_rope_scaling, got "
            f"rotary_seq_len_interpolation_factor={interpolation_factor}: transformers scales a rope in one way. "
            "Keep the checkpoint in Megatron's format."
        )


def _validate_experts(args: Any) -> None:
    frequency = args.moe_layer_freq
    # Megatron also saves the pattern as a list, one number per layer.
    if not (frequency == 1 or (isinstance(frequency, list) and all(is_moe == 1 for is_moe in frequency))):
        raise ConversionError(
            f"moe_layer_freq: every layer must be a mixture of experts, got moe_layer_freq={frequency}. "
            "Keep the checkpoint in Megatron's format."
        )
