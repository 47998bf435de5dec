"""The arguments that a checkpoint saved, whatever its age, under today's names and with nothing missing.

The rest of the package reads the names of megatron-core 0.19. A checkpoint of an older version has some of them under
another name and lacks others; here each gets what that version did. Both readers, torch_dist and legacy, use it.
"""

import argparse
import copy
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.errors import CheckpointError, DataError

TOKENIZER_HASH = "tokenizer_sha256"  # an argument of our own
# Today's name: (older names, the value from an older one). Source: core_transformer_config_from_args of core 0.4 to
# 0.15, and load_args_from_checkpoint for disable_bias_linear.
_RENAMED: dict[str, tuple[str, bool]] = {
    "layernorm_zero_centered_gamma": ("apply_layernorm_1p", True),  # until core 0.15
    "layernorm_epsilon": ("norm_epsilon", True),  # core 0.4 to 0.15; before it, layernorm_epsilon as today
    "add_bias_linear": ("disable_bias_linear", False),  # Megatron-LM before core 0.3
    "tensor_model_parallel_size": ("model_parallel_size", True),  # Megatron-LM 1
}
# What a version does that has no such argument. The value is that of the version before the argument came; its flag
# may since have another default.
_BEFORE_THE_ARGUMENT: dict[str, Any] = {
    # Megatron-LM 1 to 3 had one model class: LayerNorm, biases, learned positions, tied embeddings. Source:
    # megatron/arguments.py of v1.0, v2.0, v2.5 and v2.6, and megatron/model.
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "rotary_percent": 1.0,
    "add_bias_linear": True,
    "swiglu": False,
    "bias_gelu_fusion": False,
    "untie_embeddings_and_output_weights": False,
    "init_method_std": 0.02,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    # Since core 0.5.
    "add_qkv_bias": False,
    "rotary_interleaved": False,
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.0,
    # Since core 0.6, 0.8 (the base was a constant of the model) and 0.10.
    "qk_layernorm": False,
    "rotary_base": 10_000,
    "moe_router_pre_softmax": False,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,  # the experts had the width of the MLP
    "moe_shared_expert_intermediate_size": None,
    "use_rope_scaling": False,
    # Since core 0.11 and 0.16.
    "rope_scaling_factor": 8.0,
    "moe_shared_expert_gate": False,
}


def complete_arguments(args: Any) -> Any:
    """A copy of `args` with every argument that decides the model; what is saved is never changed.

    An argument that follows from others which are missing, such as kv_channels without hidden_size, stays missing.
    Raises CheckpointError if `args` is not a namespace.
    """
    if not isinstance(args, argparse.Namespace | types.SimpleNamespace):
        raise CheckpointError(
            f"args: must be the namespace of Megatron's arguments, got {type(args).__name__}. "
            "Pass a checkpoint that Megatron's training loop saved."
        )
    completed = copy.copy(args)
    for name, (older_name, is_same) in _RENAMED.items():
        value = getattr(args, older_name, None)
        if getattr(args, name, None) is None and value is not None:
            setattr(completed, name, value if is_same else not value)
    _fill(completed, _BEFORE_THE_ARGUMENT)
    _fill(completed, _derive(completed))  # from arguments that the line above may have filled
    return completed


def _fill(args: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def list_missing(args: Any, names: tuple[str, ...]) -> list[str]:
    """Those of `names` for which `args` has no positive whole number, with what they have: `hidden_size=None`."""
    values = {name: getattr(args, name, None) for name in names}
    return [f"{name}={value!r}" for name, value in values.items() if not _is_positive(value)]


def _derive(args: Any) -> Mapping[str, Any]:
    """What Megatron computes from the other arguments where a version does not save it."""
    heads: Any = getattr(args, "num_attention_heads", None)
    hidden_size: Any = getattr(args, "hidden_size", None)
    groups = getattr(args, "num_query_groups", None)
    is_rotary = getattr(args, "use_rotary_position_embeddings", False)
    has_position_embedding = getattr(args, "add_position_embedding", True)
    world_size: Any = getattr(args, "world_size", 1)
    tp: Any = args.tensor_model_parallel_size
    derived: dict[str, Any] = {
        "group_query_attention": groups is not None and groups != heads,
        "position_embedding_type": "rope" if is_rotary else "learned_absolute" if has_position_embedding else "none",
        "seq_length": getattr(args, "max_position_embeddings", None),
        "num_query_groups": heads,
    }
    if _is_positive(hidden_size) and _is_positive(heads):
        derived |= {"ffn_hidden_size": 4 * hidden_size, "kv_channels": hidden_size // heads}
    batch_size: Any = getattr(args, "batch_size", None)
    if _is_positive(world_size) and _is_positive(tp) and _is_positive(batch_size):
        # batch_size counted the samples per data-parallel rank, and there was no pipeline: world_size = tp * dp.
        derived["global_batch_size"] = batch_size * max(1, world_size // tp)
    return derived


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def find_saved_tokenizer(args: Any, directory: Path) -> Path | None:
    """The tokenizer of these saved arguments: in the folder of a converted checkpoint, or where they say.

    directory: the folder of the iteration, where it lies now. None where they name none, or it is not here any more.
    Raises CheckpointError if only others are in its places: a path may be relative to another folder, or be used again.
    Without a saved hash, a file at a relative path is refused, because nothing shows that it is the same one.
    """
    saved = getattr(args, "tokenizer_model", None)
    if not saved:
        return None
    # Of a converted checkpoint that was moved, the saved path is that of the old place.
    own_places = (directory / "tokenizer", directory.absolute().parent / "tokenizer")
    found = [path for path in (own_places[0], Path(saved), own_places[1]) if path.exists()]
    wanted = getattr(args, TOKENIZER_HASH, None)  # older versions and Megatron-LM's own loop save none
    if not found:
        return None
    if wanted is None:
        known = [path for path in found if path in own_places or path.is_absolute()]
        if not known:
            raise CheckpointError(
                f"{saved}: tokenizer must be known to be the checkpoint's, got a path relative to an unknown folder, "
                "and no hash. Name the tokenizer on the command line."
            )
        return known[0]
    hashes = [_hash_tokenizer(path) for path in found]
    if wanted not in hashes:
        raise CheckpointError(
            f"{found[0]}: tokenizer must be the one that the checkpoint was trained with (sha256 {wanted[:12]}), got "
            f"another (sha256 {str(hashes[0])[:12]}). Name the right one on the command line."
        )
    return found[hashes.index(wanted)]


def _hash_tokenizer(path: Path) -> str | None:
    from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer  # loads two libraries

    try:
        return hash_tokenizer(path)
    except DataError:
        return None
