"""Megatron's arguments and `ModelShape`: one table, read in both directions.

The arguments may be the namespace of a run, before or after Megatron has filled in its defaults, or those that a
checkpoint saved, which lack what their version of Megatron did not have. Flags that change the model in a way that
`ModelShape` has no field for are not read here: preflight/flags.py refuses them for a run, and
checkpoint/hugging_face/saved_model.py for a conversion. Pure; no torch, no megatron.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hammer.config.untrained_models import find_untrained
from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import (
    ModelShape,
    MoeShape,
    RopeScaling,
    SlidingWindow,
    YarnScaling,
    shorten_attention_scale,
)

ESSENTIALS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Row:
    """One field of a shape. read: its value in Megatron's arguments; write: the arguments that express it."""

    field: str
    read: Callable[[Any], Any]
    write: Callable[[Any], dict[str, Any]]


_REQUIRED = object()


def _same(field: str, argument: str | None = None, *, absent: Any = _REQUIRED) -> Row:
    """An argument with the field's own value. absent: what Megatron did before it had the argument."""
    name = argument or field

    def read(args: Any) -> Any:
        return getattr(args, name) if absent is _REQUIRED else getattr(args, name, absent)

    return Row(field, read, lambda shape: {name: getattr(shape, field)})


# --- values that Megatron derives or spreads over several arguments ---------------------------------------------------


def default_ffn_hidden_size(hidden_size: int, is_swiglu: bool) -> int:
    """Megatron's width of the MLP where --ffn-hidden-size is left out (megatron.training.arguments.validate_args)."""
    # SwiGLU has three matrices instead of two: 2/3 of the width keeps the parameters; rounded down to a multiple of 64.
    return int((4 * hidden_size * 2 / 3) / 64) * 64 if is_swiglu else 4 * hidden_size


def _read_ffn_hidden_size(args: Any) -> int:
    return args.ffn_hidden_size or default_ffn_hidden_size(args.hidden_size, args.swiglu)


def _read_query_groups(args: Any) -> int:
    """Without --group-query-attention, Megatron ignores --num-query-groups, whose default is 1."""
    # A checkpoint of a Megatron without grouped attention lacks the attribute: every head has its own key and value.
    is_grouped = getattr(args, "group_query_attention", False)
    return args.num_query_groups if is_grouped else args.num_attention_heads


def _write_query_groups(model: ModelShape) -> dict[str, Any]:
    return {
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
    }


def _read_kv_channels(args: Any) -> int | None:
    """None for heads that fill hidden_size, so that equal models are equal shapes."""
    kv_channels: int | None = args.kv_channels
    # Megatron fills kv_channels in while it validates, so a saved namespace has it where the command line had not.
    return None if not kv_channels or kv_channels * args.num_attention_heads == args.hidden_size else kv_channels


def _read_activation(args: Any) -> Literal["swiglu", "gelu_tanh", "gelu_erf"]:
    """Megatron's fused bias-gelu computes the tanh approximation; without the fusion it is the exact gelu."""
    if args.swiglu:
        return "swiglu"
    return "gelu_tanh" if args.bias_gelu_fusion and args.add_bias_linear else "gelu_erf"


def _write_activation(model: ModelShape) -> dict[str, Any]:
    # Only for the exact gelu: Megatron's default, the fusion, is right for every other activation.
    exact = {"bias_gelu_fusion": False} if model.activation == "gelu_erf" else {}
    return {"swiglu": model.activation == "swiglu", **exact}


def _read_position_embedding_type(args: Any) -> Any:
    """--use-rotary-position-embeddings is the older spelling of --position-embedding-type rope.

    "yarn" is a rope too: what differs is its rope_scaling.
    """
    is_rope = getattr(args, "use_rotary_position_embeddings", False) or args.position_embedding_type == "yarn"
    return "rope" if is_rope else args.position_embedding_type


def _write_position_embedding_type(model: ModelShape) -> dict[str, Any]:
    is_yarn = isinstance(model.rope_scaling, YarnScaling)
    return {"position_embedding_type": "yarn" if is_yarn else model.position_embedding_type}


def is_yarn(args: Any) -> bool:
    """--use-rotary-position-embeddings overrules --position-embedding-type (megatron's validate_args)."""
    return args.position_embedding_type == "yarn" and not getattr(args, "use_rotary_position_embeddings", False)


# Field of YarnScaling: (Megatron's argument, what it takes where that is not set). The arguments without the prefix are
# multi-latent attention's too. Source: megatron.training.argument_utils._apply_yarn_config_from_args.
YARN_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "factor": ("rotary_scaling_factor", 1.0),
    "original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "beta_fast": ("yarn_beta_fast", 32.0),
    "beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
    "has_whole_bounds": ("yarn_correction_range_round_to_int", True),
}


def _read_rope_scaling(args: Any) -> RopeScaling | YarnScaling | None:
    if is_yarn(args):
        numbers: dict[str, Any] = {field: getattr(args, name, None) for field, (name, _) in YARN_ARGUMENTS.items()}
        defaults = {field: default for field, (_, default) in YARN_ARGUMENTS.items() if numbers[field] is None}
        return YarnScaling(**numbers | defaults)
    if not getattr(args, "use_rope_scaling", False):
        return None
    return RopeScaling(factor=getattr(args, "rope_scaling_factor", RopeScaling().factor))


def _write_rope_scaling(model: ModelShape) -> dict[str, Any]:
    scaling = model.rope_scaling
    if isinstance(scaling, YarnScaling):
        numbers = {name: getattr(scaling, field) for field, (name, _) in YARN_ARGUMENTS.items()}
        return {"use_rope_scaling": False, **numbers}
    if scaling is None:
        return {"use_rope_scaling": False}
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}


def _read_interpolation_factor(args: Any) -> int | None:
    factor: int | None = getattr(args, "rotary_seq_len_interpolation_factor", None)
    # A factor of 1 changes nothing, so both spellings give equal shapes. Megatron's YaRN never reads it.
    return None if factor == 1 or is_yarn(args) else factor


def _read_rotary_percent(args: Any) -> float:
    """Without a rope, --rotary-percent means nothing, and Megatron's YaRN never reads it."""
    has_percent = _read_position_embedding_type(args) == "rope" and not is_yarn(args)
    return getattr(args, "rotary_percent", 1.0) if has_percent else 1.0


def _read_layers_without_rope(args: Any) -> tuple[int, ...]:
    """--no-rope-freq is a list with a 1 for each layer without a rope, or N for every N-th layer."""
    frequency: Any = getattr(args, "no_rope_freq", None)
    if not frequency or _read_position_embedding_type(args) != "rope":
        return ()
    if isinstance(frequency, int):
        return tuple(range(frequency - 1, args.num_layers, frequency))
    return tuple(layer for layer, is_without in enumerate(frequency) if is_without)


def _write_layers_without_rope(model: ModelShape) -> dict[str, Any]:
    layers, num_layers = model.layers_without_rope, model.num_layers
    if not layers:
        return {"no_rope_freq": None}
    # Megatron takes the number only where it divides the layers.
    step = layers[0] + 1
    if num_layers % step == 0 and layers == tuple(range(step - 1, num_layers, step)):
        return {"no_rope_freq": step}
    return {"no_rope_freq": [int(layer in layers) for layer in range(num_layers)]}


def _read_sliding_window(args: Any) -> SlidingWindow | None:
    """--window-size is (tokens before a position, tokens after it); preflight and the export refuse any but 0 after.

    --window-attn-skip-freq is a list with a 1 for each layer with the window, or N where every N-th layer has none.
    """
    window: Any = getattr(args, "window_size", None)
    if not window:
        return None
    frequency: Any = getattr(args, "window_attn_skip_freq", None)
    layers = tuple(layer for layer in range(args.num_layers) if _has_window(frequency, layer))
    return SlidingWindow(num_tokens=window[0] + 1, layers=layers) if layers else None


def _has_window(frequency: Any, layer: int) -> bool:
    """Source: megatron.core.transformer.utils.is_layer_window_attention, which counts layers from 1."""
    if isinstance(frequency, list):
        return bool(layer < len(frequency) and frequency[layer])
    return not frequency or (layer + 1) % frequency != 0


def _write_sliding_window(model: ModelShape) -> dict[str, Any]:
    window = model.sliding_window
    if window is None:
        return {"window_size": None, "window_attn_skip_freq": None}
    is_everywhere = len(window.layers) == model.num_layers
    pattern = None if is_everywhere else [int(layer in window.layers) for layer in range(model.num_layers)]
    return {"window_size": (window.num_tokens - 1, 0), "window_attn_skip_freq": pattern}


# megatron.core TransformerConfig.__post_init__ of 0.19.2 derives two of the multipliers of --use-mup from sizes.


def _read_embedding_multiplier(args: Any) -> float:
    return args.mup_embedding_mult if getattr(args, "use_mup", False) else 1.0


def _read_attention_scale(args: Any) -> float | None:
    """None for 1 / sqrt(head_dim), so that equal models are equal shapes."""
    if not getattr(args, "use_mup", False):
        return None
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    base = getattr(args, "mup_base_head_dim", None)
    try:
        scale = (1.0 if base is None else math.sqrt(base)) / math.pow(head_dim, args.mup_attn_scale_power)
    except (ValueError, OverflowError, ZeroDivisionError):
        return math.nan  # preflight refuses it
    return shorten_attention_scale(scale, head_dim)


def _read_logits_multiplier(args: Any) -> float:
    if not getattr(args, "use_mup", False):
        return 1.0
    # Megatron takes a multiplier of 1 for one that was not given.
    is_derived = args.mup_output_mult == 1.0 and args.mup_base_hidden_size
    return args.mup_base_hidden_size / args.hidden_size if is_derived else args.mup_output_mult


def _write_multipliers(model: ModelShape) -> dict[str, Any]:
    """--use-mup of a model that is its own base, so that neither its learning rates nor its first weights change."""
    if (model.embedding_multiplier, model.attention_scale, model.logits_multiplier) == (1.0, None, 1.0):
        return {"use_mup": False}
    scale = model.attention_scale or model.head_dim**-0.5
    return {
        "use_mup": True,
        "mup_base_hidden_size": None,
        "mup_embedding_mult": model.embedding_multiplier,
        "mup_output_mult": model.logits_multiplier,
        # The scale is sqrt(base) / head_dim ** power. No flag of Megatron has the scale itself.
        "mup_attn_scale_power": 0.0,
        "mup_base_head_dim": scale * scale,
    }


def _read_aux_loss_coeff(args: Any) -> float:
    """Megatron takes one coefficient, or a list with one for each kind of load-balancing loss."""
    coefficient: Any = args.moe_aux_loss_coeff
    return math.fsum(coefficient) if isinstance(coefficient, list) else coefficient


def _read_dense_layers(args: Any) -> tuple[int, ...]:
    """--moe-layer-freq: N for a mixture in every Nth layer, layer 0 the first; or a 1 or a 0 for every layer."""
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return tuple(layer for layer in range(args.num_layers) if layer % frequency)
    return tuple(layer for layer, is_mixture in enumerate(frequency) if not is_mixture)


def _write_layer_frequency(model: ModelShape) -> int | list[int]:
    """1 where every layer is a mixture: Megatron stacks the layers in a checkpoint for the number, not for a list."""
    if not model.is_mixed:
        return 1
    return [int(model.is_mixture(layer)) for layer in range(model.num_layers)]


def _read_topk_renormalized(args: Any) -> bool:
    """Only the softmax reads --moe-router-pre-softmax; sigmoid scores are divided by their sum if there are several."""
    if _read_score_function(args) == "softmax":
        return not getattr(args, "moe_router_pre_softmax", False)
    return bool(args.moe_router_topk > 1)


def _read_score_function(args: Any) -> Literal["softmax", "sigmoid", "sqrtsoftplus"]:
    function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = (
        getattr(args, "moe_router_score_function", None) or "softmax"
    )
    return function


def _write_score_function(moe: MoeShape) -> dict[str, Any]:
    if moe.score_function == "softmax":
        return {"moe_router_score_function": "softmax"}
    # Every published model with sigmoid scores computes them in fp32; by default Megatron has them in bf16.
    return {"moe_router_score_function": moe.score_function, "moe_router_dtype": "fp32"}


def _read_groups(args: Any) -> tuple[int | None, int | None]:
    """(num_groups, group_topk); neither where all groups are chosen, so that equal models are equal shapes."""
    num_groups, group_topk = getattr(args, "moe_router_num_groups", None), getattr(args, "moe_router_group_topk", None)
    return (None, None) if not group_topk or num_groups == group_topk else (num_groups, group_topk)


def _read_moe(args: Any) -> MoeShape | None:
    if not getattr(args, "num_experts", None):
        return None
    return MoeShape(**{row.field: row.read(args) for row in _MOE_ROWS})


def _write_moe(model: ModelShape) -> dict[str, Any]:
    if model.moe is None:
        return {}
    return {
        **_write_rows(_MOE_ROWS, model.moe),
        "moe_layer_freq": _write_layer_frequency(model),
        # The dispatcher is part of no shape, but Megatron's default, allgather, cannot run most layouts.
        "moe_token_dispatcher_type": "alltoall",
    }


# --- the table -------------------------------------------------------------------------------------------------------

_MOE_ROWS = (
    _same("num_experts"),
    _same("router_topk", "moe_router_topk"),
    Row(
        "ffn_hidden_size",
        lambda args: args.moe_ffn_hidden_size or _read_ffn_hidden_size(args),
        lambda moe: {"moe_ffn_hidden_size": moe.ffn_hidden_size},
    ),
    Row(
        "shared_expert_intermediate_size",
        lambda args: args.moe_shared_expert_intermediate_size or 0,
        lambda moe: {"moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size or None},
    ),
    Row(
        "is_topk_renormalized",
        _read_topk_renormalized,
        lambda moe: {"moe_router_pre_softmax": moe.score_function == "softmax" and not moe.is_topk_renormalized},
    ),
    Row(
        "aux_loss_coeff",
        _read_aux_loss_coeff,
        lambda moe: {"moe_aux_loss_coeff": moe.aux_loss_coeff},
    ),
    Row(
        "has_shared_expert_gate",  # Megatron ignores the gate where there is no shared expert
        lambda args: bool(args.moe_shared_expert_intermediate_size and args.moe_shared_expert_gate),
        lambda moe: {"moe_shared_expert_gate": moe.has_shared_expert_gate},
    ),
    Row("dense_layers", _read_dense_layers, lambda moe: {}),  # _write_moe: it needs the number of layers
    Row("score_function", _read_score_function, _write_score_function),
    Row(
        "has_expert_bias",
        lambda args: bool(getattr(args, "moe_router_enable_expert_bias", False)),
        lambda moe: {"moe_router_enable_expert_bias": moe.has_expert_bias},
    ),
    Row(
        "topk_scaling_factor",  # Megatron multiplies with none and with 0 as with 1
        lambda args: getattr(args, "moe_router_topk_scaling_factor", None) or 1.0,
        lambda moe: {
            "moe_router_topk_scaling_factor": None if moe.topk_scaling_factor == 1 else moe.topk_scaling_factor
        },
    ),
    Row(
        "num_groups",
        lambda args: _read_groups(args)[0],
        lambda moe: {"moe_router_num_groups": moe.num_groups},
    ),
    Row(
        "group_topk",
        lambda args: _read_groups(args)[1],
        lambda moe: {"moe_router_group_topk": moe.group_topk},
    ),
)
_ROWS = (
    _same("num_layers"),
    _same("hidden_size"),
    Row("ffn_hidden_size", _read_ffn_hidden_size, lambda model: {"ffn_hidden_size": model.ffn_hidden_size}),
    _same("num_attention_heads"),
    Row("num_query_groups", _read_query_groups, _write_query_groups),
    Row("kv_channels", _read_kv_channels, lambda model: {"kv_channels": model.head_dim}),
    _same("vocab_size"),
    _same("max_position_embeddings"),
    _same("normalization"),
    _same("norm_epsilon", "layernorm_epsilon"),
    Row("activation", _read_activation, _write_activation),
    _same("has_linear_bias", "add_bias_linear"),
    Row(
        "has_qkv_bias",  # --add-bias-linear biases linear_qkv too
        lambda args: args.add_qkv_bias or args.add_bias_linear,
        lambda model: {"add_qkv_bias": model.has_qkv_bias or model.has_linear_bias},
    ),
    Row("position_embedding_type", _read_position_embedding_type, _write_position_embedding_type),
    _same("rotary_base"),
    Row(
        "has_tied_embeddings",
        lambda args: not args.untie_embeddings_and_output_weights,
        lambda model: {"untie_embeddings_and_output_weights": not model.has_tied_embeddings},
    ),
    _same("has_embedding_norm", "embedding_norm", absent=False),
    _same("init_method_std"),
    _same("has_qk_norm", "qk_layernorm", absent=False),
    Row("rope_scaling", _read_rope_scaling, _write_rope_scaling),
    Row(
        "rotary_seq_len_interpolation_factor",
        _read_interpolation_factor,
        lambda model: {"rotary_seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor},
    ),
    Row("sliding_window", _read_sliding_window, _write_sliding_window),
    Row("rotary_percent", _read_rotary_percent, lambda model: {"rotary_percent": model.rotary_percent}),
    Row("layers_without_rope", _read_layers_without_rope, _write_layers_without_rope),
    Row("embedding_multiplier", _read_embedding_multiplier, _write_multipliers),
    Row("attention_scale", _read_attention_scale, _write_multipliers),
    Row("logits_multiplier", _read_logits_multiplier, _write_multipliers),
    _same("residual_multiplier", absent=1.0),  # ours: Megatron has no such argument
    Row("moe", _read_moe, _write_moe),
)


def read_model(args: Any, *, name: str = "custom", source: str = "command line") -> ModelShape:
    """The model that Megatron's arguments describe; they have every attribute of ESSENTIALS.

    Raises AttributeError if they lack an argument that every supported version of Megatron has.
    """
    return ModelShape(name=name, source=source, **{row.field: row.read(args) for row in _ROWS})


def build_model_arguments(model: ModelShape) -> dict[str, Any]:
    """{attribute of Megatron's namespace: value}; `read_model` gives an equal model back.

    Raises ConfigError, all problems at once, for a model that can be studied only (untrained_models.py).
    """
    if problems := find_untrained(model):
        raise ConfigError(*problems)
    return _write_rows(_ROWS, model)


def _write_rows(rows: tuple[Row, ...], shape: ModelShape | MoeShape) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.write(shape).items()}
