"""What a checkpoint's saved arguments say about the model: the part that decides names, shapes and the HF config.

Pure: reads attributes of the namespace that Megatron saved (or that its parser makes), imports neither torch nor
megatron. An argument that changes the computation in a way that no mapping expresses is refused here, all at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import MoeShape, RopeScaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One model in mcore's names; everything that `tensor_rows.py` and `write_config.py` look at."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int  # without padding
    max_position_embeddings: int
    normalization: Literal["RMSNorm", "LayerNorm"]
    norm_epsilon: float
    activation: Literal["swiglu", "gelu_tanh", "gelu_erf"]
    position_embedding_type: Literal["rope", "learned_absolute"]
    rotary_base: float
    has_linear_bias: bool
    has_qkv_bias: bool
    has_tied_embeddings: bool
    has_embedding_norm: bool
    init_method_std: float
    attention_dropout: float
    hidden_dropout: float
    moe: MoeShape | None = None
    has_qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    rotary_seq_len_interpolation_factor: int | None = None  # positions are divided by it

    @property
    def dims(self) -> dict[str, int]:
        """The symbols in which `tensor_rows.py` writes shapes."""
        moe = self.moe
        return {
            "h": self.hidden_size,
            "f": self.ffn_hidden_size,
            "2f": 2 * self.ffn_hidden_size,
            "q": self.num_attention_heads * self.head_dim,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
            "d": self.head_dim,
            "v": self.vocab_size,
            "p": self.max_position_embeddings,
            "1": 1,
            "e": moe.num_experts if moe else 0,
            "m": moe.ffn_hidden_size if moe else 0,
            "2m": 2 * moe.ffn_hidden_size if moe else 0,
            "s": moe.shared_expert_intermediate_size if moe else 0,
            "2s": 2 * moe.shared_expert_intermediate_size if moe else 0,
        }


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


def read_saved_model(args: Any, *, vocab_size: int | None = None) -> Architecture:
    """The architecture in Megatron's saved arguments; `vocab_size` replaces theirs (before padding).

    Raises ConversionError with one sentence for every argument that no mapping expresses.
    """
    _validate_expressible(args)
    vocab_size = vocab_size or getattr(args, "vocab_size", None) or getattr(args, "padded_vocab_size", None)
    if vocab_size is None:
        raise ConversionError("vocab_size: the checkpoint's arguments must hold it, got none. Pass --vocab-size.")
    is_grouped = getattr(args, "group_query_attention", False)
    return Architecture(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if is_grouped else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        normalization=args.normalization,
        norm_epsilon=args.layernorm_epsilon,
        activation=_read_activation(args),
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        has_linear_bias=args.add_bias_linear,
        has_qkv_bias=args.add_bias_linear or args.add_qkv_bias,
        has_tied_embeddings=not args.untie_embeddings_and_output_weights,
        has_embedding_norm=getattr(args, "embedding_norm", False),
        init_method_std=args.init_method_std,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        moe=_read_moe(args),
        has_qk_norm=getattr(args, "qk_layernorm", False),
        rope_scaling=_read_rope_scaling(args),
        rotary_seq_len_interpolation_factor=_read_interpolation_factor(args),
    )


def _validate_expressible(args: Any) -> None:
    problems = [
        f"{name}: cannot be exported, got {name}={getattr(args, name)!r}: {reason}. "
        "Keep the checkpoint in Megatron's format."
        for name, (is_expressible, reason) in _EXPRESSIBLE.items()
        if hasattr(args, name) and not is_expressible(getattr(args, name))
    ]
    if problems:
        raise ConversionError(*problems)


def _read_activation(args: Any) -> Literal["swiglu", "gelu_tanh", "gelu_erf"]:
    """Megatron's fused bias-gelu computes the tanh approximation; without the fusion it is the exact gelu."""
    if args.swiglu:
        return "swiglu"
    return "gelu_tanh" if args.bias_gelu_fusion and args.add_bias_linear else "gelu_erf"


def _read_rope_scaling(args: Any) -> RopeScaling | None:
    """Our training builds with the factor that was asked for; Megatron's own (gpt_config_from_args) always with 8."""
    if not getattr(args, "use_rope_scaling", False):
        return None
    factor, default = getattr(args, "rope_scaling_factor", RopeScaling().factor), RopeScaling().factor
    is_ours = hasattr(args, "embedding_norm")
    if factor != default and not is_ours:
        raise ConversionError(
            f"rope_scaling_factor: must be {default:g}, with which Megatron-LM builds whatever is asked for, got "
            f"rope_scaling_factor={factor:g}. Load and save it once with --rope-scaling-factor and what it was "
            "trained with."
        )
    return RopeScaling(factor=factor)


def _read_interpolation_factor(args: Any) -> int | None:
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor is not None and getattr(args, "use_rope_scaling", False):
        raise ConversionError(
            "rotary_seq_len_interpolation_factor: cannot be exported together with use_rope_scaling, got "
            f"rotary_seq_len_interpolation_factor={factor}: transformers scales a rope in one way. "
            "Keep the checkpoint in Megatron's format."
        )
    return None if factor == 1 else factor


def _read_moe(args: Any) -> MoeShape | None:
    if not getattr(args, "num_experts", None):
        return None
    frequency = args.moe_layer_freq
    if not (frequency == 1 or (isinstance(frequency, list) and all(is_moe == 1 for is_moe in frequency))):
        raise ConversionError(
            f"moe_layer_freq: every layer must be a mixture of experts, got moe_layer_freq={frequency}. "
            "Keep the checkpoint in Megatron's format."
        )
    coefficient = args.moe_aux_loss_coeff
    shared_size = args.moe_shared_expert_intermediate_size or 0
    return MoeShape(
        num_experts=args.num_experts,
        router_topk=args.moe_router_topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        shared_expert_intermediate_size=shared_size,
        has_shared_expert_gate=shared_size > 0 and args.moe_shared_expert_gate,
        is_topk_renormalized=not getattr(args, "moe_router_pre_softmax", False),
        aux_loss_coeff=math.fsum(coefficient) if isinstance(coefficient, list) else coefficient,
    )
