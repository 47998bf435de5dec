"""Calls where megatron and TensorBoard write: what a failing disk means for a run. training_hooks.py has the others."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from megatron_hammer.errors import HammerError


def guard_saves(check: Callable[[], None], explain: Callable[[BaseException], Exception]) -> None:
    """Call `check()` on every rank before each save; raise `explain(error)` for what fails in writing or completing it.

    error: an OSError, or torch's CheckpointException, which megatron raises on all ranks together.
    """
    from megatron.training import training
    from torch.distributed.checkpoint import CheckpointException

    original_save, original_finalize = training.save_checkpoint, training.maybe_finalize_async_save

    def explained(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (OSError, CheckpointException) as error:
                raise explain(error) from error

        return call

    @functools.wraps(original_save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            check()
        except HammerError:
            original_finalize(blocking=True)  # the save before may be written and not yet complete
            raise
        return original_save(*args, **kwargs)

    training.save_checkpoint = explained(save_checkpoint)
    training.maybe_finalize_async_save = explained(original_finalize)


def log_values(values: Mapping[str, float], step: int) -> None:
    """Write values of a step to TensorBoard and Weights & Biases, where megatron does, on the last rank.

    They come later than those of the steps after it, which Weights & Biases refuses, so there the step is a value too.
    """
    from megatron.training import training

    writer, wandb = training.get_tensorboard_writer(), training.get_wandb_writer()
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(f"evaluation/{name}", value, step)
        writer.flush()
    if wandb is not None:
        wandb.define_metric("evaluation/*", step_metric="evaluation/step")
        # Not committed: the row of the current step gets them, and megatron adds its own values to it.
        wandb.log({"evaluation/step": step, **{f"evaluation/{name}": v for name, v in values.items()}}, commit=False)


def postpone_wandb_finish() -> Callable[[], None]:
    """Keep the run of Weights & Biases open when megatron ends; returns what closes it. Megatron's globals must be set.

    Scores of the last checkpoints come after megatron's end.
    """
    from megatron.training import training

    wandb = training.get_wandb_writer()
    if wandb is None:
        return lambda: None
    finish: Callable[[], None] = wandb.finish
    wandb.finish = lambda *_, **__: None
    return finish


def lose_tensorboard_events() -> None:
    """Have TensorBoard's files lose what the disk does not take, instead of ending the run at the next value."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.summary.writer.record_writer import RecordWriter

    def losing(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(OSError):
                function(*args, **kwargs)

        return call

    for name in ("add_event", "flush", "close"):
        setattr(EventFileWriter, name, losing(getattr(EventFileWriter, name)))
    # Its thread writes here, and would end with a stack trace.
    RecordWriter.write, RecordWriter.flush = losing(RecordWriter.write), losing(RecordWriter.flush)
