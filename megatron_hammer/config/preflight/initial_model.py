"""Whether --load-hf fits the rest of the command: one model, whatever names it, and weights that can be put into it."""

import argparse
from typing import Any

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.initial_model import InitialModel, find_checkpoint_to_load
from megatron_hammer.config.model_arguments import build_model_arguments, list_missing_essentials, read_model
from megatron_hammer.config.preflight.checkpoint import FLAGS
from megatron_hammer.config.preflight.values import find_value_problems, flag_of

# Of a model's arguments those that change neither a tensor nor what is computed from it.
FREE = frozenset({"init_method_std", "moe_aux_loss_coeff", "moe_token_dispatcher_type"})
# Where Megatron keeps the parameters in other places or types than a module's own, and their quiet values.
NEEDS_CONVERSION: dict[str, tuple[object, ...]] = {
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "fp8_param_gather": (False,),
    "fp4_param_gather": (False,),
    "moe_use_upcycling": (False,),
    "init_model_with_meta_device": (False,),
}
# Where the optimizer makes its fp32 weights itself, from the rounded ones.
ROUNDS_WEIGHTS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
# What fits into 16 bits without rounding, by the precision of a run.
EXACT_IN = {"bf16": "bfloat16", "fp16": "float16"}


def find_initial_model_problems(arguments: ParsedArguments) -> list[str]:
    """Everything against starting from `arguments.start`; nothing without --load-hf."""
    namespace, start = arguments.namespace, arguments.start
    if start is None:
        return []
    problems = _find_preset_differences(arguments, start) + _find_flag_differences(namespace, start)
    if namespace.pretrained_checkpoint is not None:
        problems.append(
            f"load-hf: a run begins with one model's weights, got load_hf={namespace.load_hf}, "
            f"pretrained_checkpoint={namespace.pretrained_checkpoint}. Drop one of the two."
        )
    if find_checkpoint_to_load(namespace) is None:
        problems += start.problems
        problems += _find_unfillable(namespace, start)
    return problems


def _find_preset_differences(arguments: ParsedArguments, start: InitialModel) -> list[str]:
    if arguments.preset is None:
        return []
    differences = _list_differences(build_model_arguments(arguments.preset.model), build_model_arguments(start.model))
    return [
        f"preset: must be of the model in {start.folder}, got {name}={_show(value)} in {arguments.preset.name}, "
        f"{_show(expected)} in config.json. Drop --preset, or name the preset of this model."
        for name, value, expected in differences
        if name != "max_position_embeddings"  # then the folder's counts
    ]


def _find_flag_differences(namespace: argparse.Namespace, start: InitialModel) -> list[str]:
    """Flags that make another model than the folder's; without flags it is the folder's."""
    if list_missing_essentials(namespace) or find_value_problems(namespace):
        return []
    differences = _list_differences(build_model_arguments(read_model(namespace)), build_model_arguments(start.model))
    return [
        f"{FLAGS.get(name, flag_of(name))}: must be as in {start.folder}/config.json, got {name}={_show(value)}, there "
        f"{_show(expected)}. Drop the flag."
        for name, value, expected in differences
    ]


def _list_differences(got: dict[str, Any], expected: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    free = set(FREE)
    if expected["position_embedding_type"] == "rope":
        free.add("max_position_embeddings")  # no tensor has that size, and Megatron only compares it with seq_length
    return [
        (name, got.get(name), expected.get(name))
        for name in {**expected, **got}
        if name not in free and got.get(name) != expected.get(name)
    ]


def _find_unfillable(namespace: argparse.Namespace, start: InitialModel) -> list[str]:
    remedy = "Convert the folder with checkpoint_convert/hf_to_megatron.py and pass --load"
    problems = [
        f"{flag_of(name)}: does not go with --load-hf, which fills a module's own parameters, got "
        f"{name}={_show(getattr(namespace, name))}. {remedy}, or drop the flag."
        for name, quiet in NEEDS_CONVERSION.items()
        if getattr(namespace, name, quiet[0]) not in quiet
    ]
    precision = "bf16" if namespace.bf16 else "fp16" if namespace.fp16 else "fp32"
    if precision in EXACT_IN and start.dtype != EXACT_IN[precision]:
        problems += [
            f"{flag_of(name)}: would take its fp32 weights from {precision}, got {name}=on, weights of {start.dtype} "
            f"in {start.folder}. Drop the flag, or convert the weights to {EXACT_IN[precision]} first."
            for name in ROUNDS_WEIGHTS
            if getattr(namespace, name, False)
        ]
    return problems


def _show(value: object) -> str:
    return "on" if value is True else "off" if value is False else str(value)
