"""Where a run's checkpoints are read and written."""

import os
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.paths import find_unwritable, is_same_place
from megatron_hammer.config.preflight.resume import find_resume_problems
from megatron_hammer.config.run_plan import Checkpoints, RunPlan, RunSettings
from megatron_hammer.config.saved_run import read_saved_run
from megatron_hammer.errors import CheckpointError


def find_checkpoint_problems(settings: RunSettings, plan: RunPlan | None) -> list[str]:
    """--load must hold a checkpoint, or Megatron would start from random weights with a warning in its log.

    There are two exceptions. The command that continues its own run has --load equal to --save, and its folder is new
    at first. With --load-hf or --pretrained-checkpoint, which give the first weights, --load may be empty until then.
    """
    checkpoints = settings.checkpoints
    problems = []
    if checkpoints.save is not None:
        problems += find_unwritable("save", checkpoints.save)
    if settings.output.tensorboard_dir is not None:
        problems += find_unwritable("tensorboard_dir", settings.output.tensorboard_dir)
    problems += _find_metrics_problems(settings.output.metrics_path, checkpoints.save)
    if checkpoints.load is not None:
        tracker_path = Path(checkpoints.load) / LATEST_FILE
        has_other_weights = checkpoints.pretrained is not None or settings.initial_model is not None
        # With --ckpt-step the tracker is not needed: the folder's name follows from the step.
        if os.path.isfile(tracker_path) or checkpoints.step:
            problems += _find_step_problems(settings, plan, tracker_path)
        elif not (has_other_weights or is_same_place(checkpoints.load, checkpoints.save)):
            what = f"a checkpoint ({LATEST_FILE})" if os.path.isdir(checkpoints.load) else "an existing folder"
            problems.append(
                f"load: must be {what}, got load={checkpoints.load}. Pass the folder that --save wrote, or leave "
                "--load out: Megatron would start from random weights."
            )
    return problems + _find_pretrained_problems(checkpoints)


def _find_pretrained_problems(checkpoints: Checkpoints) -> list[str]:
    name, path = "pretrained_checkpoint", checkpoints.pretrained
    if path is None or os.path.isfile(Path(path) / LATEST_FILE):
        return []
    return [
        f"{flag_of(name)}: must be a checkpoint ({LATEST_FILE}), got {name}={path}. Pass the folder that --save wrote."
    ]


def _find_metrics_problems(path: str | None, save: str | None) -> list[str]:
    """--metrics-path is a file in a folder that can be written; a folder that is --save is checked with it."""
    # By default metrics.jsonl is in --save, which would then be reported twice.
    if path is None or is_same_place(os.path.dirname(path), save):
        return []
    if os.path.isdir(path):
        return [f"metrics-path: must be a file, got a folder, metrics_path={path}. Pass {path}/metrics.jsonl."]
    return find_unwritable("metrics_path", os.path.dirname(path) or ".")


def _find_step_problems(settings: RunSettings, plan: RunPlan | None, tracker_path: Path) -> list[str]:
    """The step that is asked for, or the tracker's, must be there, and must be one that this run can continue."""
    checkpoints = settings.checkpoints
    if checkpoints.step:
        folder, named_by = f"iter_{checkpoints.step:07d}", "--ckpt-step"
    else:
        # errors="replace": a damaged tracker must become the problem below, not a UnicodeDecodeError.
        text = tracker_path.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not text.isdecimal():
            return [
                f"{tracker_path}: must hold a step number or 'release', got {text[:40]!r}. "
                "Restore it, or name a step that exists with --ckpt-step."
            ]
        # "release" is what Megatron calls a checkpoint of weights without a run, such as a converted one.
        folder, named_by = "release" if text == "release" else f"iter_{int(text):07d}", LATEST_FILE
    checkpoint_dir = tracker_path.parent / folder
    if not checkpoint_dir.is_dir():
        return [
            f"load: checkpoint {folder} named by {named_by} is missing, got load={checkpoints.load}. "
            "Copy it there, or name a step that exists with --ckpt-step."
        ]
    return _find_saved_problems(settings, plan, checkpoint_dir)


def _find_saved_problems(settings: RunSettings, plan: RunPlan | None, checkpoint_dir: Path) -> list[str]:
    """Whether the checkpoint is whole, and whether this run can continue it.

    One process of each node checks: a large checkpoint's metadata is large too. Formats other than torch_dist are left
    to Megatron's loader.
    """
    if settings.machine.local_rank != 0 or not (checkpoint_dir / ".metadata").is_file():
        return []
    try:
        saved = read_saved_run(checkpoint_dir)
    except CheckpointError as error:
        # The reader's problems name files; the prefix says which flag led to them.
        return [f"load: {problem}" for problem in error.problems]
    return find_resume_problems(settings, plan, saved)
