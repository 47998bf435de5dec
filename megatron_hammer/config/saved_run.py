"""The checkpoint that a run would load: where it is, and what it says of the run that saved it."""

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.checkpoint_files.checkpoint_reader import RELEASE, read_tracker
from megatron_hammer.checkpoint_files.intact import find_visible_damage
from megatron_hammer.checkpoint_files.iterations import list_iterations
from megatron_hammer.checkpoint_files.newest_intact import (
    LoadChoice,
    choose_iteration,
    has_checkpoint,
)
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.config.initial_model import InitialModel
from megatron_hammer.config.model_arguments import read_model
from megatron_hammer.config.read_plan import read_batch, read_data, read_evaluation, read_schedule, read_sft
from megatron_hammer.config.run_plan import (
    Batch,
    Checkpoints,
    RunPlan,
    Schedule,
    build_order_settings,
    build_row_layout,
    count_needed_samples,
)
from megatron_hammer.config.training_state import RECORD_NAME
from megatron_hammer.data.order.review import OrderReview, SavedOrder, review_order
from megatron_hammer.data.order.run_order import OrderSettings
from megatron_hammer.errors import CheckpointError
from megatron_hammer.model.shape import ModelShape

UNREAD_FORMATS = ("torch_dcp", "fsdp_dtensor")  # Megatron's loader alone reads them


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRun:
    """A checkpoint and the run that saved it. A part is None where another version of Megatron saved other arguments.

    num_samples, num_validation_samples: drawn so far, 0 where it does not say. record: of its data order, as stored.
    """

    directory: Path
    iteration: int
    num_samples: int
    num_validation_samples: int
    model: ModelShape | None
    schedule: Schedule | None
    batch: Batch | None
    order: OrderSettings | None
    record: object
    expert_model_parallel_size: int
    has_optimizer: bool


def read_saved_run(directory: Path) -> SavedRun:
    """The run that saved the checkpoint in `directory`; its files are read once per process. Raises CheckpointError."""
    return open_saved_run(directory, (directory / ".metadata").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def open_saved_run(directory: Path, mtime_ns: int) -> SavedRun:
    """mtime_ns: so that a checkpoint that was written anew is read again."""
    checkpoint = open_checkpoint(directory)
    args = checkpoint.args
    return SavedRun(
        directory=directory,
        iteration=checkpoint.iteration,
        num_samples=getattr(args, "consumed_train_samples", 0),
        num_validation_samples=getattr(args, "consumed_valid_samples", 0),
        model=_read_part(read_model, args),
        schedule=_read_part(read_schedule, args),
        batch=_read_part(read_batch, args),
        order=_read_part(_read_order_settings, args),
        record=getattr(args, RECORD_NAME, None),
        expert_model_parallel_size=getattr(args, "expert_model_parallel_size", 1),
        has_optimizer=not getattr(args, "no_save_optim", None),
    )


def _read_part[T](read: Callable[[argparse.Namespace], T], args: argparse.Namespace) -> T | None:
    try:
        return read(args)
    except (AttributeError, TypeError):  # saved by another version of Megatron, which had other arguments
        return None


def _read_order_settings(args: argparse.Namespace) -> OrderSettings:
    needed = count_needed_samples(read_schedule(args), read_evaluation(args), read_batch(args))
    sft = read_sft(args)
    rows = None if sft is None else build_row_layout(sft, args.seq_length, args.context_parallel_size)
    return build_order_settings(read_data(args), needed, args.seq_length, rows)


# --- which checkpoint a run loads -----------------------------------------------------------------------------------


def find_checkpoint_to_load(checkpoints: Checkpoints) -> str | None:
    """The folder whose checkpoint a run begins with, resumed or not; None where it begins without one."""
    load = checkpoints.load
    if load is not None and (checkpoints.step or has_checkpoint(load)):
        return load
    return checkpoints.pretrained


def choose_checkpoint(checkpoints: Checkpoints, rejected: Mapping[Path, str] | None = None) -> LoadChoice:
    """Which iteration of that folder; rejected: why one that looks intact is not, for who has read all of it.

    Only a resumed run falls back to an older iteration; what --pretrained-checkpoint names is loaded or refused.
    """
    if checkpoints.agreed is not None:
        return checkpoints.agreed
    folder = find_checkpoint_to_load(checkpoints)
    if folder is None:
        # Perhaps there are saves that never came to their end.
        folder = checkpoints.load
    if folder is None or not os.path.isdir(folder):
        return LoadChoice()
    return _choose(
        Path(folder),
        checkpoints.step,
        folder == checkpoints.load,
        None if checkpoints.format in UNREAD_FORMATS else checkpoints.is_verified,
        tuple((rejected or {}).items()),
        tuple(_stamp(Path(folder))),
    )


@functools.lru_cache(maxsize=4)
def _choose(
    folder: Path,
    step: int | None,
    has_fall_back: bool,
    has_hash_check: bool | None,
    rejected: tuple[tuple[Path, str], ...],
    stamp: tuple[object, ...],
) -> LoadChoice:
    """has_hash_check: None where this package cannot read the format. stamp: so that changed folders are read again."""

    def find_damage(directory: Path) -> list[str]:
        return [] if has_hash_check is None else find_visible_damage(directory, has_hash_check=has_hash_check)

    return choose_iteration(
        folder, step=step, has_fall_back=has_fall_back, rejected=dict(rejected), find_damage=find_damage
    )


def _stamp(folder: Path) -> Iterator[object]:
    for directory in (folder / RELEASE, *list_iterations(folder).values()):
        for path in (directory, directory / ".metadata"):
            yield str(path), path.stat().st_mtime_ns if path.exists() else None
    yield read_tracker(folder)


def describe_weights(checkpoints: Checkpoints, initial_model: InitialModel | None) -> str:
    """Where the first weights of a run come from, in one line."""
    load_dir = find_checkpoint_to_load(checkpoints)
    if load_dir is not None:
        unread = "" if initial_model is None else f"; {initial_model.folder} is not read again"
        choice = choose_checkpoint(checkpoints)
        name = f" {choice.directory.name}" if choice.notes and choice.directory is not None else ""
        # A run has printed the notes by now, one a line (training/saving/resumption.py).
        notes = choice.notes if checkpoints.agreed is None else ()
        return "; ".join([f"checkpoint{name} in {load_dir}{unread}", *notes])
    return "random" if initial_model is None else f"{initial_model.folder} ({initial_model.description})"


def select_checkpoint_dir(checkpoints: Checkpoints) -> Path | None:
    """The folder of the iteration that a run resumes from; None without one, or for a released model."""
    if checkpoints.load is None or find_checkpoint_to_load(checkpoints) != checkpoints.load:
        return None
    choice = choose_checkpoint(checkpoints)
    return None if choice.iteration is None else choice.directory


def find_resumed_run(plan: RunPlan) -> SavedRun | None:
    """The run that --load continues; None where none is, or where this package cannot read the checkpoint."""
    directory = select_checkpoint_dir(plan.checkpoints)
    # --finetune begins again at step 0, and without training no further sample is drawn.
    is_resumed = not (plan.checkpoints.is_finetuned or plan.schedule.skips_training)
    if directory is None or not is_resumed or not (directory / ".metadata").is_file():
        return None
    try:
        return read_saved_run(directory)
    except CheckpointError:
        return None  # preflight/checkpoint.py reports it


# --- the order of its samples ---------------------------------------------------------------------------------------


def review_resumed_order(plan: RunPlan) -> tuple[SavedRun, OrderReview] | None:
    """The run that is resumed, and its order of samples against this one's; None where nothing resumes, or no data."""
    saved = find_resumed_run(plan)
    if saved is None:
        return None
    batch = plan.batch.global_batch_size
    iteration, num_consumed = saved.iteration, saved.num_samples or saved.iteration * batch
    if plan.checkpoints.iteration_override is not None:
        iteration = plan.checkpoints.iteration_override
        num_consumed = iteration * batch
    if not num_consumed:
        return None
    review = review_order(
        plan.order,
        SavedOrder(num_consumed=num_consumed, settings=saved.order, record=saved.record),
        last_sample=plan.count_last_sample(iteration, num_consumed),
        last_validation_sample=plan.count_last_validation_sample(iteration, saved.num_validation_samples),
    )
    return None if review is None else (saved, review)
