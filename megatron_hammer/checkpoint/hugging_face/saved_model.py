"""The model of a checkpoint, from the arguments that it saved, if Hugging Face can express it.

config/model_arguments.py reads the arguments. An argument that changes the computation in a way that no mapping
expresses is refused here, all at once, and so is a set argument that no table knows (argument_effects.py). Pure:
imports neither torch nor megatron.
"""

import argparse
from collections.abc import Collection, Iterator
from typing import Any

from megatron_hammer.checkpoint.hugging_face.argument_effects import EXPRESSIBLE, is_known
from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.checkpoint_files.saved_arguments import complete_arguments, list_missing
from megatron_hammer.config.model_arguments import ESSENTIALS, YARN_ARGUMENTS, is_yarn, read_model
from megatron_hammer.config.own_flags import add_own_flags
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape, RopeScaling

# What this package adds to the arguments, beside its flags.
_OWN_NAMES = frozenset({"imported_from", "is_sft"})
_CAN_BE_EMPTY = (bool, int, float, str, list, tuple, dict, set)  # what is false of these types is not set


def read_saved_model(args: Any, *, vocab_size: int | None = None, ignored: Collection[str] = ()) -> ModelShape:
    """The model in Megatron's saved arguments of any version; `vocab_size` replaces theirs (before padding).

    ignored: names of set arguments that no table knows and that do not change the computation, as the user says.
    Raises ConversionError with one sentence for every argument that no mapping expresses, and for every one that is
    missing or unknown.
    """
    args = complete_arguments(args)
    problems = [*_list_inexpressible(args), *_list_unknown(args, ignored)]
    # padded_vocab_size last: with it the rows of padding become tokens of the exported model.
    vocab_size = vocab_size or getattr(args, "vocab_size", None) or getattr(args, "padded_vocab_size", None)
    if vocab_size is None:
        problems.append("vocab_size: the checkpoint's arguments must hold it, got none. Pass --vocab-size.")
    sizes = tuple(name for name in ESSENTIALS if name != "vocab_size")
    if missing := list_missing(args, sizes):
        problems.append(
            "arguments: must hold the sizes of the model as positive whole numbers, got "
            f"{', '.join(missing)}. Save the checkpoint with Megatron's training loop, which stores its arguments."
        )
    if problems:
        raise ConversionError(*problems)
    _validate_rope(args)
    if args.num_experts:
        _validate_experts(args)
    completed = argparse.Namespace(**{**vars(args), "vocab_size": vocab_size})
    return read_model(completed, source="saved arguments")


def read_saved_dropout(args: Any) -> Dropout:
    """The dropout that the model was trained with."""
    return Dropout(attention=args.attention_dropout, hidden=args.hidden_dropout)


def has_zero_centered_norms(args: Any) -> bool:
    """Whether the stored weights of the norms lack the 1 that Megatron adds to them (--apply-layernorm-1p)."""
    return bool(complete_arguments(args).layernorm_zero_centered_gamma)


def _list_inexpressible(args: Any) -> Iterator[str]:
    for name, (is_expressible, reason) in EXPRESSIBLE.items():
        if hasattr(args, name) and not is_expressible(getattr(args, name)):
            yield (
                f"{name}: cannot be exported, got {name}={getattr(args, name)!r}: {reason}. "
                "Keep the checkpoint in Megatron's format."
            )


def _list_unknown(args: Any, ignored: Collection[str]) -> Iterator[str]:
    """Set arguments that no version of Megatron in the table has: a newer one, or a fork."""
    ours = _OWN_NAMES | {action.dest for action in add_own_flags(argparse.ArgumentParser())._actions}
    unknown = {
        # Not `value in (...)`: a tensor or an array of a fork compares element by element.
        name: value
        for name, value in vars(args).items()
        if not (is_known(name) or name in ours or value is None or (isinstance(value, _CAN_BE_EMPTY) and not value))
    }
    for name in sorted(unknown.keys() - set(ignored)):
        yield (
            f"{name}: is not an argument of Megatron up to core 0.19, and may change what the model computes, got "
            f"{name}={str(unknown[name])[:60]}. If it does not, pass --ignore-arguments {name}."
        )
    for name in sorted(set(ignored) - unknown.keys()):
        yield f"ignore-arguments: must name unknown arguments of the checkpoint that are set, got {name}. Drop it."


def _validate_rope(args: Any) -> None:
    """Our training builds with the factor that was asked for; Megatron's own (gpt_config_from_args) always with 8."""
    if is_yarn(args):
        _validate_yarn(args)
        return  # Megatron's YaRN reads neither
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


def _validate_yarn(args: Any) -> None:
    problems = [
        f"{name}: must be a number, got {name}={value!r}. Save the checkpoint with Megatron's training loop."
        for name, value in ((name, getattr(args, name, None)) for name, _ in YARN_ARGUMENTS.values())
        if not (value is None or isinstance(value, int | float))
    ]
    if problems:
        raise ConversionError(*problems)


def _validate_experts(args: Any) -> None:
    frequency = args.moe_layer_freq
    is_number = isinstance(frequency, int) and frequency >= 1
    # The pattern of a list has one number per layer.
    if not is_number and not (
        isinstance(frequency, list)
        and len(frequency) == args.num_layers
        and all(is_mixture in (0, 1) for is_mixture in frequency)
        and any(frequency)
    ):
        raise ConversionError(
            "moe_layer_freq: must be a positive number, or a 0 or a 1 for each layer and not 0 for all, got "
            f"moe_layer_freq={frequency}, num_layers={args.num_layers}. Its saved arguments are not its own."
        )
