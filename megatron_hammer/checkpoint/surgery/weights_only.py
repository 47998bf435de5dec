"""Keeps only the weights of a training checkpoint: a release, from which --load starts a new run at step 0.

Left out: the optimizer, random states, the schedule, and how many samples were consumed, which all belong to the run.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.surgery.rewriting import (
    OnTensor,
    PlannedCheckpoint,
    copy_objects,
    plan_copy,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import TrainingCheckpoint, open_training_checkpoint
from megatron_hammer.checkpoint_files.checkpoint_reader import RELEASE

_KEPT_STATE = ("args", "iteration", "checkpoint_version", "content_metadata")
_CONSUMED = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
_DATA_ORDER_RECORD = "data_order_record"  # which data the run has drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsReport:
    """What was written. iteration: the one that the weights are of. Bytes: of all files of the folder."""

    save_dir: Path
    iteration: int
    num_weights: int
    num_dropped_tensors: int
    num_dropped_objects: int
    num_bytes_before: int
    num_bytes: int
    elapsed_s: float


def keep_weights(
    load_dir: Path,
    save_dir: Path,
    *,
    iteration: int | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor = lambda stage, done, total: None,
) -> WeightsReport:
    """Write `save_dir/release`, complete and read back, or nothing. Raises HammerError for a damaged checkpoint."""
    started_at_s = time.monotonic()
    checkpoint = open_training_checkpoint(load_dir, iteration=iteration)
    objects = checkpoint.list_model_objects()
    planned = PlannedCheckpoint(
        tensors=[plan_copy(checkpoint, key) for key in checkpoint.model],
        objects=copy_objects(checkpoint, objects),
        common_state=build_release_state(checkpoint),
        iteration=None,
    )
    write_planned_checkpoint(save_dir, planned, on_tensor, sources=[checkpoint], overwrite=overwrite)
    return WeightsReport(
        save_dir=save_dir,
        iteration=checkpoint.store.common_state["iteration"],
        num_weights=len(checkpoint.model),
        num_dropped_tensors=len(checkpoint.optimizer),
        num_dropped_objects=len(checkpoint.store.objects) - len(objects),
        num_bytes_before=count_folder_bytes(checkpoint.directory),
        num_bytes=count_folder_bytes(save_dir / RELEASE),
        elapsed_s=time.monotonic() - started_at_s,
    )


def build_release_state(checkpoint: TrainingCheckpoint) -> dict[str, Any]:
    """The common state of a release: the arguments, as of a run that has consumed nothing."""
    state = checkpoint.copy_common_state()
    released = {name: state[name] for name in _KEPT_STATE if name in state}
    released["args"].no_save_optim = released["args"].no_save_rng = True  # it holds neither
    # A run that starts from the release begins with the first sample of its own data.
    for name in _CONSUMED:
        setattr(released["args"], name, 0)
    if hasattr(released["args"], _DATA_ORDER_RECORD):
        delattr(released["args"], _DATA_ORDER_RECORD)
    return released


def count_folder_bytes(directory: Path) -> int:
    """Of all files directly in it, as an iteration's folder has them."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
