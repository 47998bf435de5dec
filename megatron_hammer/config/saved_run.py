"""The checkpoint that a run would resume from, and the arguments it was saved with."""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.config.samples import select_global_batch_size
from megatron_hammer.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRun:
    """The run that a checkpoint continues. num_consumed: training samples that it has drawn, in its order."""

    directory: Path
    args: argparse.Namespace
    iteration: int
    num_consumed: int


def read_saved_run(namespace: argparse.Namespace) -> SavedRun | None:
    """The run that --load continues; None where none is, or where the checkpoint is not one that this package reads."""
    directory = select_checkpoint_dir(namespace)
    if directory is None or namespace.finetune or namespace.skip_train or not (directory / ".metadata").is_file():
        return None
    try:
        args, iteration = read_saved_arguments(directory, (directory / ".metadata").stat().st_mtime_ns)
    except CheckpointError:
        return None  # preflight_checkpoint reports it
    batch = select_global_batch_size(namespace)
    consumed = getattr(args, "consumed_train_samples", 0) or iteration * batch
    if namespace.override_ckpt_iteration is not None:
        iteration, consumed = namespace.override_ckpt_iteration, namespace.override_ckpt_iteration * batch
    return SavedRun(directory=directory, args=args, iteration=iteration, num_consumed=consumed) if consumed else None


def select_checkpoint_dir(namespace: argparse.Namespace) -> Path | None:
    """The folder that Megatron would resume from, which may not exist; None without one, or for a released model."""
    if namespace.load is None:
        return None
    if namespace.ckpt_step:
        return Path(namespace.load) / f"iter_{namespace.ckpt_step:07d}"
    try:
        text = (Path(namespace.load) / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return Path(namespace.load) / f"iter_{int(text):07d}" if text.isdecimal() else None


@functools.lru_cache(maxsize=1)
def read_saved_arguments(directory: Path, mtime_ns: int) -> tuple[argparse.Namespace, int]:
    """(arguments, iteration) of a checkpoint, read once a process. Raises CheckpointError."""
    checkpoint = open_checkpoint(directory)
    return checkpoint.args, checkpoint.iteration
