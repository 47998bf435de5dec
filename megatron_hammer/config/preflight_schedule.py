"""Length of the run, learning rate, evaluation, and where checkpoints come from and go to."""

import argparse
import os
from pathlib import Path

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.preflight_values import flag_of

TRACKER_NAME = "latest_checkpointed_iteration.txt"  # Megatron's pointer to the newest checkpoint of a folder


# --- steps and learning rate ----------------------------------------------------------------------------------------


def find_schedule_problems(arguments: ParsedArguments) -> list[str]:
    """Steps against samples, warm-up against decay, and the learning rates."""
    namespace = arguments.namespace
    if namespace.skip_train:
        return []
    problems = _find_unit_problems(namespace)
    if not problems:
        problems += _find_warmup_problems(namespace)
    if namespace.lr is not None and namespace.min_lr is not None and namespace.min_lr > namespace.lr:
        problems.append(
            f"min-lr: must not be above lr, got min_lr={namespace.min_lr:g}, lr={namespace.lr:g}. "
            f"Pass --min-lr {namespace.lr / 10:g}, or a higher --lr."
        )
    if namespace.lr is not None and namespace.lr_warmup_init > namespace.lr:
        problems.append(
            f"lr-warmup-init: must not be above lr, got lr_warmup_init={namespace.lr_warmup_init:g}, "
            f"lr={namespace.lr:g}. Pass a lower --lr-warmup-init."
        )
    if namespace.lr_decay_style == "WSD" and not (namespace.lr_wsd_decay_iters or namespace.lr_wsd_decay_samples):
        problems.append(
            "lr-wsd-decay-iters: must be given with --lr-decay-style WSD, got lr_wsd_decay_iters=None. "
            "Pass the number of steps at the end over which the learning rate falls."
        )
    return problems


def _find_unit_problems(namespace: argparse.Namespace) -> list[str]:
    """A run counts in steps or in samples; Megatron refuses a mixture."""
    if namespace.train_iters is not None and namespace.train_samples is not None:
        return [
            f"train-samples: a run has one length, got train_samples={namespace.train_samples}, "
            f"train_iters={namespace.train_iters}. Pass --train-iters or --train-samples."
        ]
    in_samples = namespace.train_samples is not None
    unit, other = ("samples", "iters") if in_samples else ("iters", "samples")
    problems = [
        f"{flag_of(name)}: must be counted like the run, got {name}={getattr(namespace, name)} with "
        f"--train-{unit}. Pass --{flag_of(name.replace(other, unit))}."
        for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}")
        if getattr(namespace, name)
    ]
    if namespace.lr_warmup_fraction is not None and getattr(namespace, f"lr_warmup_{unit}"):
        problems.append(
            f"lr-warmup-fraction: a warm-up has one length, got lr_warmup_fraction={namespace.lr_warmup_fraction:g}, "
            f"lr_warmup_{unit}={getattr(namespace, f'lr_warmup_{unit}')}. Pass --lr-warmup-{unit} 0 with it."
        )
    return problems


def _find_warmup_problems(namespace: argparse.Namespace) -> list[str]:
    unit = "samples" if namespace.train_samples is not None else "iters"
    length = getattr(namespace, f"train_{unit}")
    decay = getattr(namespace, f"lr_decay_{unit}") or length
    warmup = getattr(namespace, f"lr_warmup_{unit}")
    if length is None or namespace.lr_warmup_fraction is not None or warmup < decay:
        return []
    return [
        f"lr-warmup-{unit}: must be below the {decay} {unit} of the run (--lr-decay-{unit}, or --train-{unit}), got "
        f"lr_warmup_{unit}={warmup}. Pass --lr-warmup-{unit} {decay // 10}."
    ]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def find_checkpoint_problems(arguments: ParsedArguments) -> list[str]:
    """--load must hold a checkpoint, or Megatron would start from random weights with a warning in its log.

    The exception is --load equal to --save: the command that continues its own run, whose folder is new at first.
    """
    namespace = arguments.namespace
    problems = []
    if namespace.save is not None:
        problems += find_unwritable("save", namespace.save)
    is_own_run = namespace.save is not None and _same_place(namespace.load, namespace.save)
    if namespace.load is not None:
        tracker_path = Path(namespace.load) / TRACKER_NAME
        if tracker_path.is_file() or namespace.ckpt_step:
            problems += _find_step_problems(namespace, tracker_path)
        elif not is_own_run and namespace.pretrained_checkpoint is None:
            what = f"a checkpoint ({TRACKER_NAME})" if Path(namespace.load).is_dir() else "an existing folder"
            problems.append(
                f"load: must be {what}, got load={namespace.load}. Pass the folder that --save wrote, or leave "
                "--load out: Megatron would start from random weights."
            )
    name = "pretrained_checkpoint"
    path = namespace.pretrained_checkpoint
    if path is not None and not (Path(path) / TRACKER_NAME).is_file():
        problems.append(
            f"{flag_of(name)}: must be a checkpoint ({TRACKER_NAME}), got {name}={path}. "
            "Pass the folder that --save wrote."
        )
    return problems


def _find_step_problems(namespace: argparse.Namespace, tracker_path: Path) -> list[str]:
    """The step that is asked for, or the tracker's, must be there, and its optimizer must suit the expert layout."""
    if namespace.ckpt_step:
        folder, named_by = f"iter_{namespace.ckpt_step:07d}", "--ckpt-step"
    else:
        text = tracker_path.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdecimal():
            return [
                f"{tracker_path}: must hold a step number or 'release', got {text[:40]!r}. "
                "Restore it, or name a step that exists with --ckpt-step."
            ]
        folder, named_by = "release" if text == "release" else f"iter_{int(text):07d}", TRACKER_NAME
    checkpoint_dir = tracker_path.parent / folder
    if not checkpoint_dir.is_dir():
        return [
            f"load: checkpoint {folder} named by {named_by} is missing, got load={namespace.load}. "
            "Copy it there, or name a step that exists with --ckpt-step."
        ]
    return _find_saved_layout_problems(namespace, checkpoint_dir)


def _find_saved_layout_problems(namespace: argparse.Namespace, checkpoint_dir: Path) -> list[str]:
    from megatron_hammer.config.megatron_checks import read_saved_arguments

    saved = read_saved_arguments(checkpoint_dir)
    if saved is None:
        return []
    problems = []
    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts"):
        before, now = getattr(saved, name, None), getattr(namespace, name)
        if before is not None and now is not None and before != now:
            problems.append(
                f"{flag_of(name)}: must be the checkpoint's, got {name}={now}, in {checkpoint_dir} {before}. "
                "Load another checkpoint, or change the model back."
            )
    saved_ep: int = getattr(saved, "expert_model_parallel_size", 1)
    ep: int = namespace.expert_model_parallel_size
    loads_optimizer = not (namespace.finetune or namespace.no_load_optim)
    if loads_optimizer and namespace.num_experts and (saved_ep > 1) != (ep > 1):
        # With EP the experts' parameters have an optimizer of their own, without it they share one
        # (megatron.core.optimizer.ChainedOptimizer.load_state_dict: 'Expected 2 entries').
        problems.append(
            "expert-model-parallel-size: an optimizer saved without expert parallelism resumes only without it, and "
            f"one saved with it only with it, got ep={ep}, in {checkpoint_dir} ep={saved_ep}. "
            f"Use --expert-model-parallel-size {saved_ep}, or pass --no-load-optim or --finetune."
        )
    return problems


def find_unwritable(name: str, path: str) -> list[str]:
    """Whether `path` is a folder that can be written, or could be made; nothing is made."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    why = "is not writable" if folder.is_dir() else "is not a folder"
    return [f"{flag_of(name)}: must be a folder that can be written, got {name}={path} ({folder} {why}). Pass another."]


def _same_place(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second)
