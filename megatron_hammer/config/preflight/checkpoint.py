"""Where a run's checkpoints are read and written."""

import os
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.checkpoint_files.newest_intact import LoadChoice, has_checkpoint
from megatron_hammer.config.flags import flag_of
from megatron_hammer.config.preflight.paths import find_unwritable, is_same_place
from megatron_hammer.config.preflight.resume import find_resume_problems
from megatron_hammer.config.preflight.space import count_needed_bytes, find_space_problems
from megatron_hammer.config.run_plan import Output, RunPlan, RunSettings
from megatron_hammer.config.saved_run import choose_checkpoint, find_checkpoint_to_load, read_saved_run
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
        if plan is not None and settings.machine.rank == 0 and not settings.machine.is_planned:
            problems += find_space_problems(checkpoints.save, count_needed_bytes(plan, Path(checkpoints.save)))
    if settings.output.tensorboard_dir is not None:
        problems += find_unwritable("tensorboard_dir", settings.output.tensorboard_dir)
    problems += _find_metrics_problems(settings.output.metrics_path, checkpoints.save)
    problems += _find_prometheus_problems(settings.output)
    if checkpoints.load is not None:
        has_other_weights = checkpoints.pretrained is not None or settings.initial_model is not None
        # With --ckpt-step the tracker is not needed: the folder's name follows from the step.
        if checkpoints.step or has_checkpoint(checkpoints.load):
            problems += _find_saved_problems(settings, plan)
        elif not (has_other_weights or is_same_place(checkpoints.load, checkpoints.save)):
            what = f"a checkpoint ({LATEST_FILE})" if os.path.isdir(checkpoints.load) else "an existing folder"
            problems.append(
                f"load: must be {what}, got load={checkpoints.load}. Pass the folder that --save wrote, or leave "
                "--load out: Megatron would start from random weights."
            )
    return problems + _find_pretrained_problems(settings)


def _find_pretrained_problems(settings: RunSettings) -> list[str]:
    name, path = "pretrained_checkpoint", settings.checkpoints.pretrained
    if path is None:
        return []
    if os.path.isfile(os.path.join(path, LATEST_FILE)):
        is_checked = settings.machine.local_rank == 0 and find_checkpoint_to_load(settings.checkpoints) == path
        choice = choose_checkpoint(settings.checkpoints) if is_checked else LoadChoice()
        return [f"{flag_of(name)}: {problem}" for problem in choice.problems]
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


def _find_prometheus_problems(output: Output) -> list[str]:
    path, port, problems = output.prometheus_file, output.prometheus_port, []
    if path is not None:
        if os.path.isdir(path):
            problems.append(
                f"prometheus-file: must be a file, got a folder, prometheus_file={path}. Pass a file in it."
            )
        problems += find_unwritable("prometheus_file", os.path.dirname(path) or ".")
    if port is not None and not 0 < port < 65536:
        problems.append(f"prometheus-port: must be 1 to 65535, got prometheus_port={port}. Pass another one.")
    return problems


def _find_saved_problems(settings: RunSettings, plan: RunPlan | None) -> list[str]:
    """Whether there is an iteration that is whole, and whether this run can continue it.

    One process of each node checks: a large checkpoint's metadata is large too. Formats other than torch_dist are left
    to Megatron's loader.
    """
    if settings.machine.local_rank != 0:
        return []
    choice = choose_checkpoint(settings.checkpoints)
    # The problems name files; the prefix says which flag led to them.
    if choice.problems:
        return [f"load: {problem}" for problem in choice.problems]
    if choice.directory is None or not (choice.directory / ".metadata").is_file():
        return []
    try:
        saved = read_saved_run(choice.directory)
    except CheckpointError as error:
        return [f"load: {problem}" for problem in error.problems]
    return find_resume_problems(settings, plan, saved)
