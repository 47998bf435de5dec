"""Whether --load-hf fits the rest of the command: one model, whatever names it, and weights that can be put into it."""

from typing import Any

from megatron_hammer.config.flags import flag_of, show_value
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.config.run_plan import RunSettings
from megatron_hammer.config.saved_run import find_checkpoint_to_load
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset

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


def find_initial_model_problems(settings: RunSettings) -> list[str]:
    """Everything against starting from the model of --load-hf; nothing without it."""
    initial, checkpoints = settings.initial_model, settings.checkpoints
    if initial is None:
        return []
    problems = [] if settings.preset is None else _find_preset_differences(settings.preset, initial)
    problems += [] if settings.model is None else _find_flag_differences(settings.model, initial)
    if checkpoints.pretrained is not None:
        problems.append(
            f"load-hf: a run begins with one model's weights, got load_hf={settings.flags['load_hf']}, "
            f"pretrained_checkpoint={checkpoints.pretrained}. Drop one of the two."
        )
    # A run that resumes takes its weights from its checkpoint, so the folder's need not be readable.
    if find_checkpoint_to_load(checkpoints) is None:
        problems += [*initial.problems, *_find_unfillable(settings, initial)]
    return problems


def _find_preset_differences(preset: Preset, initial: InitialModel) -> list[str]:
    return [
        f"preset: must be of the model in {initial.folder}, got {name}={show_value(value)} in {preset.name}, "
        f"{show_value(expected)} in config.json. Drop --preset, or name the preset of this model."
        for name, value, expected in _list_differences(preset.model, initial.model)
        if name != "max_position_embeddings"  # then the folder's counts
    ]


def _find_flag_differences(model: ModelShape, initial: InitialModel) -> list[str]:
    """Flags that make another model than the folder's; without flags it is the folder's."""
    return [
        f"{flag_of(name)}: must be as in {initial.folder}/config.json, got {name}={show_value(value)}, there "
        f"{show_value(expected)}. Drop the flag."
        for name, value, expected in _list_differences(model, initial.model)
    ]


def _list_differences(model: ModelShape, expected_model: ModelShape) -> list[tuple[str, Any, Any]]:
    """(argument, value, value expected) of each argument that changes a tensor or what is computed from it."""
    got, expected = build_model_arguments(model), build_model_arguments(expected_model)
    free = set(FREE)
    if expected["position_embedding_type"] == "rope":
        free.add("max_position_embeddings")  # no tensor has that size, and Megatron only compares it with seq_length
    return [
        (name, got.get(name), expected.get(name))
        for name in {**expected, **got}
        if name not in free and got.get(name) != expected.get(name)
    ]


def _find_unfillable(settings: RunSettings, initial: InitialModel) -> list[str]:
    flags, precision = settings.flags, settings.precision
    remedy = "Convert the folder with hammer convert from-hf and pass --load"
    problems = [
        f"{flag_of(name)}: does not go with --load-hf, which fills a module's own parameters, got "
        f"{name}={show_value(flags[name])}. {remedy}, or drop the flag."
        for name in flags.list_loud(NEEDS_CONVERSION)
    ]
    # An fp32 run has no second copy of its weights, so nothing is rounded on the way to the optimizer.
    if precision in EXACT_IN and initial.dtype != EXACT_IN[precision]:
        problems += [
            f"{flag_of(name)}: would take its fp32 weights from {precision}, got {name}=on, weights of {initial.dtype} "
            f"in {initial.folder}. Drop the flag, or convert the weights to {EXACT_IN[precision]} first."
            for name in ROUNDS_WEIGHTS
            if flags.values.get(name)
        ]
    return problems
