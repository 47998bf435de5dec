"""Where a run's checkpoints come from and go to."""

import argparse
import os
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.model_arguments import list_missing_essentials, read_model
from megatron_hammer.config.preflight.resume import find_schedule_changes
from megatron_hammer.config.preflight.values import find_value_problems, flag_of
from megatron_hammer.config.saved_run import read_saved_arguments
from megatron_hammer.errors import CheckpointError
from megatron_hammer.model.shape import ModelShape

# Attributes whose flag has another name.
FLAGS = {
    "layernorm_epsilon": "norm-epsilon",
    "add_bias_linear": "disable-bias-linear",
    "bias_gelu_fusion": "no-bias-gelu-fusion",
}


def find_checkpoint_problems(arguments: ParsedArguments) -> list[str]:
    """--load must hold a checkpoint, or Megatron would start from random weights with a warning in its log.

    The exceptions are --load equal to --save, the command that continues its own run, whose folder is new at first;
    and a folder that is there for that case with --load-hf or --pretrained-checkpoint, which then give the weights.
    """
    namespace = arguments.namespace
    problems = []
    if namespace.save is not None:
        problems += find_unwritable("save", namespace.save)
    if namespace.tensorboard_dir is not None:
        problems += find_unwritable("tensorboard_dir", namespace.tensorboard_dir)
    problems += _find_metrics_problems(namespace)
    is_own_run = namespace.save is not None and _same_place(namespace.load, namespace.save)
    if namespace.load is not None:
        tracker_path = Path(namespace.load) / LATEST_FILE
        if os.path.isfile(tracker_path) or namespace.ckpt_step:
            problems += _find_step_problems(arguments, tracker_path)
        elif not is_own_run and namespace.pretrained_checkpoint is None and arguments.start is None:
            what = f"a checkpoint ({LATEST_FILE})" if os.path.isdir(namespace.load) else "an existing folder"
            problems.append(
                f"load: must be {what}, got load={namespace.load}. Pass the folder that --save wrote, or leave "
                "--load out: Megatron would start from random weights."
            )
    name = "pretrained_checkpoint"
    path = namespace.pretrained_checkpoint
    if path is not None and not os.path.isfile(Path(path) / LATEST_FILE):
        problems.append(
            f"{flag_of(name)}: must be a checkpoint ({LATEST_FILE}), got {name}={path}. "
            "Pass the folder that --save wrote."
        )
    return problems


def _find_metrics_problems(namespace: argparse.Namespace) -> list[str]:
    """--metrics-path is a file in a folder that can be written; the one below --save is looked at with it."""
    path = namespace.metrics_path
    if path is None or (namespace.save is not None and _same_place(os.path.dirname(path), namespace.save)):
        return []
    if os.path.isdir(path):
        return [f"metrics-path: must be a file, got a folder, metrics_path={path}. Pass {path}/metrics.jsonl."]
    return find_unwritable("metrics_path", os.path.dirname(path) or ".")


def _find_step_problems(arguments: ParsedArguments, tracker_path: Path) -> list[str]:
    """The step that is asked for, or the tracker's, must be there, and its optimizer must suit the expert layout."""
    namespace = arguments.namespace
    if namespace.ckpt_step:
        folder, named_by = f"iter_{namespace.ckpt_step:07d}", "--ckpt-step"
    else:
        text = tracker_path.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdecimal():
            return [
                f"{tracker_path}: must hold a step number or 'release', got {text[:40]!r}. "
                "Restore it, or name a step that exists with --ckpt-step."
            ]
        folder, named_by = "release" if text == "release" else f"iter_{int(text):07d}", LATEST_FILE
    checkpoint_dir = tracker_path.parent / folder
    if not checkpoint_dir.is_dir():
        return [
            f"load: checkpoint {folder} named by {named_by} is missing, got load={namespace.load}. "
            "Copy it there, or name a step that exists with --ckpt-step."
        ]
    return _find_saved_problems(arguments, checkpoint_dir)


def _find_saved_problems(arguments: ParsedArguments, checkpoint_dir: Path) -> list[str]:
    """Whether the checkpoint is whole, of this model, and with an optimizer that this expert layout can take.

    One process a node looks: a large checkpoint's metadata is large too. Other formats than torch_dist are left to
    Megatron's loader.
    """
    namespace = arguments.namespace
    if namespace.local_rank != 0 or not (checkpoint_dir / ".metadata").is_file():
        return []
    try:
        saved, _ = read_saved_arguments(checkpoint_dir, (checkpoint_dir / ".metadata").stat().st_mtime_ns)
    except CheckpointError as error:
        return [f"load: {problem}" for problem in error.problems]
    problems = _find_other_model(arguments, saved, checkpoint_dir)
    if checkpoint_dir.name == "release":
        return problems  # weights alone: Megatron loads neither optimizer nor schedule from it
    problems += find_schedule_changes(namespace, saved, checkpoint_dir)
    saved_ep: int = getattr(saved, "expert_model_parallel_size", 1)
    ep: int = namespace.expert_model_parallel_size
    loads_optimizer = not (namespace.finetune or namespace.no_load_optim or getattr(saved, "no_save_optim", None))
    if loads_optimizer and namespace.num_experts and (saved_ep > 1) != (ep > 1):
        # With EP the experts' parameters have an optimizer of their own, without it they share one
        # (megatron.core.optimizer.ChainedOptimizer.load_state_dict: 'Expected 2 entries').
        problems.append(
            "expert-model-parallel-size: an optimizer saved without expert parallelism resumes only without it, and "
            f"one saved with it only with it, got ep={ep}, in {checkpoint_dir} ep={saved_ep}. "
            f"Use --expert-model-parallel-size {saved_ep}, convert the checkpoint with "
            f"checkpoint_convert/edit_checkpoint.py reshard --expert-model-parallel-size {ep}, or pass --no-load-optim "
            "or --finetune."
        )
    return problems


def _find_other_model(arguments: ParsedArguments, saved: argparse.Namespace, checkpoint_dir: Path) -> list[str]:
    """Differences that change the shape of a tensor or what is computed from it. The vocabulary is left to Megatron,
    which can pad it anew. With --finetune a typed flag may change the computation.
    """
    namespace = arguments.namespace
    if list_missing_essentials(namespace) or find_value_problems(namespace):
        return []
    try:
        models = read_model(saved), read_model(namespace)
    except AttributeError:  # saved by another version of Megatron, which had other arguments
        return []
    before, now = map(_describe_shape, models)
    computed_before, computed_now = map(_describe_computation, models)
    problems = [
        f"{flag}: must be as in the checkpoint, got {now[flag]}, in {checkpoint_dir} {before[flag]}. "
        "Load another checkpoint, or change the model back."
        for flag in now
        if now[flag] != before[flag]
    ]
    return problems + [
        f"{FLAGS.get(name, flag_of(name))}: must be as in the checkpoint, or it computes something else from the same "
        f"weights, got {computed_now[name]}, in {checkpoint_dir} {computed_before[name]}. "
        f"Pass --{FLAGS.get(name, flag_of(name))} as it was, or --finetune with it to begin a run that changes it."
        for name in computed_now
        if computed_now[name] != computed_before.get(name, computed_now[name])
        and not (namespace.finetune and name in arguments.typed)
    ]


def _describe_shape(model: ModelShape) -> dict[str, object]:
    """What decides the names and shapes of the parameters, by the flag that sets it."""
    moe = model.moe
    return {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "num-query-groups": model.num_query_groups,
        "kv-channels": model.head_dim,
        "ffn-hidden-size": model.ffn_hidden_size if moe is None else None,
        "swiglu": model.activation == "swiglu",
        "normalization": model.normalization,
        "position-embedding-type": model.position_embedding_type,
        "disable-bias-linear": not model.has_linear_bias,
        "add-qkv-bias": model.has_qkv_bias,
        "untie-embeddings-and-output-weights": not model.has_tied_embeddings,
        "embedding-norm": model.has_embedding_norm,
        "qk-layernorm": model.has_qk_norm,
        "num-experts": moe and moe.num_experts,
        "moe-ffn-hidden-size": moe and moe.ffn_hidden_size,
        "moe-shared-expert-intermediate-size": moe and moe.shared_expert_intermediate_size,
        "moe-shared-expert-gate": moe and moe.has_shared_expert_gate,
    }


def _describe_computation(model: ModelShape) -> dict[str, object]:
    """What changes no tensor but what is computed from them, by Megatron's attribute; where it has any effect."""
    values: dict[str, object] = {"layernorm_epsilon": model.norm_epsilon}
    if model.position_embedding_type == "rope":
        values["rotary_base"] = model.rotary_base
        values["use_rope_scaling"] = model.rope_scaling is not None
    if model.rope_scaling is not None:
        values["rope_scaling_factor"] = model.rope_scaling.factor
    if model.activation != "swiglu":
        values["bias_gelu_fusion"] = model.activation == "gelu_tanh"
    if model.moe is not None:
        values["moe_router_topk"] = model.moe.router_topk
        values["moe_router_pre_softmax"] = not model.moe.is_topk_renormalized
    return values


def find_unwritable(name: str, path: str) -> list[str]:
    """Whether `path` is a folder that can be written, or could be made; nothing is made.

    os.path and not pathlib, which raises where a folder on the way may not be entered.
    """
    folder = Path(path).absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    why = "is not writable" if folder.is_dir() else "is not a folder"
    return [f"{flag_of(name)}: must be a folder that can be written, got {name}={path} ({folder} {why}). Pass another."]


def _same_place(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second)
