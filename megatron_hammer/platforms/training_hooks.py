"""Calls from megatron's training loop, which has no callbacks for them: its functions are wrapped, once, by name."""

import functools
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_hammer.checkpoint_files.checkpoint_reader import name_folder
from megatron_hammer.errors import CheckpointError


def observe_training(observer: Any) -> None:
    """Call `observer` (training/observer.py) at the steps and evaluations of megatron's loop, which has no callbacks.

    Wraps train_step, training_log, evaluate_and_print_results and evaluate of megatron.training.training, and passes
    their results on unchanged. There are two differences.

    Megatron does not reset its running means after the first step of a process, so its second printed line is a mean of
    two steps and differs after a resume. Here every line that it prints covers only its own interval.

    Megatron evaluates again after the last step where the loop has just done so, on other samples of the set, which
    gives one step two validation losses. Here the second evaluation is left out.
    """
    from megatron.training import training

    original_step, original_log = training.train_step, training.training_log
    original_evaluations, original_evaluate = training.evaluate_and_print_results, training.evaluate
    current = {"step": 0, "is_test": False}

    @functools.wraps(original_step)
    def train_step(
        forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, **options: Any
    ) -> Any:
        observer.begin_step(optimizer.param_groups)
        return original_step(forward_step, data_iterator, model, optimizer, *rest, **options)

    @functools.wraps(original_log)
    def training_log(
        losses: Any, totals: Any, lr: Any, step: int, loss_scale: Any, report: Any, is_skipped: Any, grad_norm: Any,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        observer.end_step(
            step=step, losses=losses, grad_norm=grad_norm, loss_scale=loss_scale, is_skipped=bool(is_skipped)
        )
        # With True, megatron would keep the first step's sums for the second printed line.
        options["is_first_iteration"] = False
        return original_log(losses, totals, lr, step, loss_scale, report, is_skipped, grad_norm, *rest, **options)

    @functools.wraps(original_evaluations)
    def evaluate_and_print_results(
        prefix: str, forward_step: Any, data_iterator: Any, model: Any, step: int, *rest: Any, **options: Any
    ) -> Any:
        if "on validation set" in prefix and current["step"] == step > 0:
            return None  # the loop has just evaluated these weights
        current["step"], current["is_test"] = step, "test set" in prefix
        observer.begin_evaluation()
        return original_evaluations(prefix, forward_step, data_iterator, model, step, *rest, **options)

    @functools.wraps(original_evaluate)
    def evaluate(*arguments: Any, **options: Any) -> Any:
        losses, other, is_out_of_time = original_evaluate(*arguments, **options)
        # Out of time, megatron returns no losses.
        if not is_out_of_time:
            observer.end_evaluation_of_set(step=current["step"], is_test=current["is_test"], losses=losses)
        return losses, other, is_out_of_time

    training.train_step, training.training_log = train_step, training_log
    training.evaluate_and_print_results, training.evaluate = evaluate_and_print_results, evaluate


# Functions of megatron.training.training, each with the phase of a run that it is.
_PHASES = {
    "setup_model_and_optimizer": "building the model",
    "build_train_valid_test_data_iterators": "building the data",
    "load_checkpoint": "loading",
    "train_step": "training",
    "evaluate": "evaluating",
    "save_checkpoint": "saving",
}


def follow_progress(record: Any) -> None:
    """Keep `record` (training/supervision/progress.py) at the phase and the step where megatron's loop is.

    Every wait for a collective is noted too, where the host waits: on GPUs only for some.
    """
    from megatron.training import training
    from torch.distributed import Work

    original_wait = Work.wait

    @functools.wraps(original_wait)
    def wait(*arguments: Any, **options: Any) -> Any:
        record.begin_wait()
        result = original_wait(*arguments, **options)
        record.end_wait()
        return result

    Work.wait = wait

    def follow(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def followed(*arguments: Any, **options: Any) -> Any:
            previous = record.enter(phase)
            result = original(*arguments, **options)
            # Not after an error: the record then says where it came from. Between two steps the run is training, too.
            if phase != "training":
                record.enter(previous)
            return result

        return followed

    for name, phase in _PHASES.items():
        setattr(training, name, follow(getattr(training, name), phase))
    original_log = training.training_log

    @functools.wraps(original_log)
    def training_log(losses: Any, totals: Any, lr: Any, step: int, *rest: Any, **options: Any) -> Any:
        result = original_log(losses, totals, lr, step, *rest, **options)
        record.finish_step(step)
        return result

    training.training_log = training_log


def form_process_group() -> None:
    """Have all ranks find each other, as megatron does later; what they must agree on before that can then be asked.

    Megatron's globals must be set. It finds the group and builds those of the parallel layout on it.
    """
    from megatron.training import initialize

    initialize._initialize_distributed(None, None, None, skip_model_parallel_init=True)


def load_iteration(folder: str, iteration: int | None) -> None:
    """Have megatron load this iteration (None: a release) from this folder, whatever its tracker says, if it has one.

    Megatron ends a load that fails in the legacy format with exit code 0; here it is a CheckpointError.
    """
    from megatron.training import checkpointing, training

    original_read, original_load = checkpointing.read_metadata, training.load_checkpoint
    tracker = checkpointing.get_checkpoint_tracker_filename(folder)

    @functools.wraps(original_read)
    def read_metadata(path: str) -> tuple[int, bool]:
        return (iteration or 0, iteration is None) if path == tracker else original_read(path)

    @functools.wraps(checkpointing.checkpoint_exists)
    def checkpoint_exists(path: str | None) -> bool:
        return path == folder or (
            path is not None and os.path.isfile(checkpointing.get_checkpoint_tracker_filename(path))
        )

    @functools.wraps(original_load)
    def load_checkpoint(*arguments: Any, **options: Any) -> Any:
        try:
            return original_load(*arguments, **options)
        except SystemExit as stop:
            raise CheckpointError(
                f"{os.path.join(folder, name_folder(iteration))}: must be a checkpoint that megatron can load, got one "
                "at which it stopped. The rank's log, in logs/ under --save, says why; use another iteration."
            ) from stop

    checkpointing.read_metadata, training.load_checkpoint = read_metadata, load_checkpoint
    checkpointing.checkpoint_exists = training.checkpoint_exists = checkpoint_exists


def fill_new_model(fill: Callable[[Any, Any], None]) -> None:
    """Call `fill(model chunks, optimizer)` once megatron has built both, on every rank.

    It must come after the optimizer, whose fp32 weights keep what a 16-bit parameter rounds away. Megatron's own hook
    (ModelConfig.pre_wrap_hooks) is called before there is an optimizer.
    """
    from megatron.training import training

    original = training.setup_model_and_optimizer

    @functools.wraps(original)
    def setup_model_and_optimizer(*arguments: Any, **options: Any) -> Any:
        model, optimizer, scheduler = original(*arguments, **options)
        fill(model, optimizer)
        return model, optimizer, scheduler

    training.setup_model_and_optimizer = setup_model_and_optimizer


def observe_saves(observer: Any) -> None:
    """Call `observer.end_save(step, elapsed_s)` on every rank when megatron's loop continues after it has saved.

    An asynchronous save is then still being written.
    """
    from megatron.training import training

    original = training.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(iteration: int, *arguments: Any, **options: Any) -> Any:
        started_at_s = time.perf_counter()
        result = original(iteration, *arguments, **options)
        if not options.get("non_persistent_ckpt"):
            observer.end_save(iteration, time.perf_counter() - started_at_s)
        return result

    training.save_checkpoint = save_checkpoint


def _wrap_steps(begin: Callable[[int], None], permits: Callable[[Any], bool], end: Callable[..., Any]) -> None:
    """Call `begin(step)`, `permits(model)` and `end(model, result)` around every step of megatron's loop.

    step: counted from 1. permits: asked between the backward pass and the update, which is not made on False. end: its
    value is the step's result. Of several wraps, the last one begins first and is asked first.
    """
    from megatron.training import training

    original_step = training.train_step
    is_guarded = False

    @functools.wraps(original_step)
    def train_step(
        forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *rest: Any, iteration: int, **options: Any
    ) -> Any:
        nonlocal is_guarded
        begin(iteration + 1)
        if not is_guarded:
            original_update, is_guarded = optimizer.step, True
            # (was the update made, norm of the gradients, number of zeros in them)
            optimizer.step = lambda: original_update() if permits(model) else (False, None, None)
        result = original_step(forward_step, data_iterator, model, optimizer, *rest, iteration=iteration, **options)
        return end(model, result)

    training.train_step = train_step


def take_fingerprints(record: Any) -> None:
    """Show `record` (training/fingerprints.py) the gradients and weights of every step of megatron's loop."""

    def permits(model: Any) -> bool:
        record.add_gradients(model)
        return True

    def end(model: Any, result: Any) -> Any:
        record.end_step(model)
        return result

    _wrap_steps(record.begin_step, permits, end)


def judge_steps(judge: Any) -> None:
    """Ask `judge` (training/supervision/bad_steps.py) before megatron's optimizer changes a weight.

    Megatron's own answer to a value that is not finite is exit code 16 or 17, after running the step again. Here its
    check only tells the judge.
    """
    import torch
    from megatron.core.rerun_state_machine import RerunStateMachine

    machine: Any = RerunStateMachine
    original_validate = machine.validate_result

    @functools.wraps(original_validate)
    def validate_result(
        self: Any, result: Any, rejection_func: Any, message: str, *rest: Any, fatal: bool = True, **options: Any
    ) -> None:
        if not fatal:
            original_validate(self, result, rejection_func, message, *rest, fatal=fatal, **options)
        elif rejection_func is torch.isnan:  # the same norm comes again for torch.isinf
            is_injected = self.error_injector.maybe_inject()
            judge.add_norm(torch.full_like(result, torch.nan) if is_injected else result)

    def end(model: Any, result: Any) -> Any:
        if not judge.has_ended_run:
            return result
        # losses, is skipped, should save, should exit, exit code, norm, number of zeros, attention logit
        return {}, True, judge.must_save(), True, 0, None, None, 0

    machine.validate_result = validate_result
    _wrap_steps(judge.begin_step, lambda model: judge.permits_update(), end)


def stop_on_signals_too(signals: tuple[Any, ...]) -> list[signal.Signals]:
    """Let these signals save and stop as megatron's own exit signal does; its handler takes only one.

    Before the loop there is nothing to save, and each ends the process at once: megatron would build everything, which
    may take hours, train one step and save it. Call as soon as megatron's globals are set. Returns a list that grows by
    each signal that arrives in the loop or later.
    """
    from megatron.training import training

    # Megatron's own handler, so that every signal sets the flag that its loop reads.
    own = training.get_signal_handler().sig
    handler = signal.getsignal(own)
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        handler(number, frame)  # type: ignore[operator, misc]

    def handle_with(action: Any) -> None:
        for number in {*signals, own}:
            signal.signal(number, action)

    original_train = training.train

    @functools.wraps(original_train)
    def train(*arguments: Any, **options: Any) -> Any:
        handle_with(note)
        return original_train(*arguments, **options)

    training.train = train
    handle_with(signal.SIG_DFL)
    return received
