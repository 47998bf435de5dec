"""The main path: from a command line to a trained checkpoint. Read this file first, from top to bottom.

    torchrun --nproc-per-node 8 -m megatron_hammer.training.pretrain --preset hammer-1b4 --data-path data/corpus ...
    srun --ntasks-per-node 8 python -m megatron_hammer.training.pretrain --preset hammer-1b4 --data-path data/corpus ...
    python -m megatron_hammer.training.pretrain --preset hammer-1b4 --world-size 64 --dry-run

The engine is megatron.training.pretrain, unmodified; we hand it a configuration, a dataset provider and a forward step
and listen to its loop. Imports stay inside the functions: megatron takes seconds to import, the platform must be
chosen before it is, and the processes that megatron spawns to write checkpoints import this module again.
"""

import functools
import os
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from megatron_hammer.config.environment import read_slurm_variables
from megatron_hammer.errors import USER_ERROR_EXIT_CODE, ConfigError, exit_on_user_error
from megatron_hammer.training.launch import (
    choose_common_exit_code,
    die_silently_of_interrupts,
    end_with_launcher,
    list_stop_signals,
)
from megatron_hammer.training.supervision.ending import ends_soon, skip_teardown
from megatron_hammer.training.supervision.last_words import leave_last_words, note_user_errors
from megatron_hammer.training.supervision.progress import ProgressRecord, open_record
from megatron_hammer.training.supervision.run_folder import repeat_run

if TYPE_CHECKING:
    from megatron_hammer.config.arguments import ParsedArguments
    from megatron_hammer.config.initial_model import InitialModel
    from megatron_hammer.config.run_plan import RunPlan, RunSettings
    from megatron_hammer.config.training_state import TrainingState
    from megatron_hammer.training.fingerprints import FingerprintFile
    from megatron_hammer.training.observer import RunObserver
    from megatron_hammer.training.saving.lock import RunLock
    from megatron_hammer.training.saving.retention import Retainer
    from megatron_hammer.training.supervision.bad_steps import StepJudge


@exit_on_user_error
@note_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, or with --dry-run say what would be trained. Raises HammerError for every problem a user can fix."""
    # First: everything below reads a process's place from torchrun's variables.
    os.environ.update(read_slurm_variables(os.environ))
    end_with_launcher()
    die_silently_of_interrupts()
    skip_teardown()
    leave_last_words()
    progress = open_record()
    argv = repeat_run(sys.argv[1:] if argv is None else argv)
    arguments = prepare(argv)
    if arguments.settings.output.is_dry_run:
        dry_run(arguments, sys.stdout)
    else:
        plan = check(arguments)
        record_start(argv, arguments, plan)
        with ends_soon():
            sys.exit(train(arguments, plan, open_terminal(plan), progress))


def prepare(argv: Sequence[str], *, is_plan: bool = False) -> "ParsedArguments":
    """Choose platform and backend, adjust megatron to them, and read the command line over its preset.

    is_plan: nothing will be started, as with --dry-run, so neither GPUs nor the other ranks need to be here.
    """
    from megatron_hammer.config.connections import set_connections
    from megatron_hammer.config.own_flags import read_option
    from megatron_hammer.platforms import megatron_compat
    from megatron_hammer.platforms.select import select_backend, select_platform

    # Before the platform is chosen, which may initialise CUDA; CUDA reads the variable only then.
    set_connections(argv)
    is_plan = is_plan or "--dry-run" in argv
    where = {"is_plan": is_plan, "is_for_this_machine": read_option(argv, "--world-size") is None}
    platform = select_platform(read_option(argv, "--platform") or "auto", **where)
    backend = select_backend(read_option(argv, "--backend") or "auto", platform=platform, **where)
    megatron_compat.install(platform, backend)

    from megatron_hammer.config.arguments import parse_arguments

    refuse_outputs_that_are_pipes(argv)
    initial_model = read_named_model(argv)
    return parse_arguments(argv, platform=platform, backend=backend, is_plan=is_plan, initial_model=initial_model)


def refuse_outputs_that_are_pipes(argv: Sequence[str]) -> None:
    """Raise ConfigError for a named pipe where the run reads and writes a file of its own; it would wait there."""
    from pathlib import Path

    from megatron_hammer.config.own_flags import read_option
    from megatron_hammer.files.read import refuse_pipe, refuse_pipes

    save, metrics_path = read_option(argv, "--save"), read_option(argv, "--metrics-path")
    if save is not None:
        refuse_pipes(Path(save), raises=ConfigError)
    if metrics_path is not None and os.path.exists(metrics_path):
        refuse_pipe(Path(metrics_path), ConfigError)


def read_named_model(argv: Sequence[str]) -> "InitialModel | None":
    """The model of --load-hf; None without it. Raises ConversionError if its architecture is not supported."""
    from megatron_hammer.config.own_flags import read_option

    load_hf = read_option(argv, "--load-hf")
    if load_hf is None:
        return None

    from pathlib import Path

    from megatron_hammer.training.initial_model import read_initial_model

    return read_initial_model(Path(load_hf))


def check(arguments: "ParsedArguments") -> "RunPlan":
    """The plan of a run that can start; raises ConfigError with all problems, before any process group forms."""
    from megatron_hammer.config.preflight.find_problems import find_problems

    problems = find_problems(arguments)
    if problems:
        raise ConfigError(*problems)
    return arguments.require_plan()


def dry_run(arguments: "ParsedArguments", terminal: IO[str]) -> None:
    """Print what would run and every problem found; exit with 2 if there are any."""
    from megatron_hammer.config.dry_run.dry_run import build_dry_run_report, print_report
    from megatron_hammer.config.preflight.find_problems import find_problems

    problems = find_problems(arguments)
    print_report(build_dry_run_report(arguments, problems), terminal, as_json=arguments.settings.output.has_json)
    if problems:
        sys.exit(USER_ERROR_EXIT_CODE)


def record_start(argv: Sequence[str], arguments: "ParsedArguments", plan: "RunPlan") -> None:
    """Leave under --save how the run was started, from which --from-run repeats it."""
    from pathlib import Path

    from megatron_hammer.training.cluster.software import identify_data
    from megatron_hammer.training.supervision.run_folder import describe_start, write_start

    save = plan.checkpoints.save
    if save is not None and plan.machine.rank == 0:
        start = describe_start(argv, identify_data(plan.data.sources))
        write_start(Path(save), start, arguments.settings.flags.values)


def open_terminal(settings: "RunSettings") -> IO[str]:
    """The stream for what a person reads; megatron's own output goes to a file unless --verbose."""
    from pathlib import Path

    from megatron_hammer.training.terminal import divert_output, leave_stacks, lose_what_is_not_taken

    if settings.output.is_verbose:
        sys.stdout = lose_what_is_not_taken(sys.stdout)
        leave_stacks(sys.stdout)
        return sys.stdout
    save_dir = settings.checkpoints.save
    return divert_output(None if save_dir is None else Path(save_dir), settings.machine.rank)[0]


def train(arguments: "ParsedArguments", plan: "RunPlan", terminal: IO[str], progress: ProgressRecord) -> int:
    """Run megatron's training loop to the end of the schedule or to a signal, and report; returns the exit code."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_hammer.config.arguments import build_config_container, finalize_arguments
    from megatron_hammer.config.datasets import build_dataset_provider
    from megatron_hammer.model.provider import build_model_config
    from megatron_hammer.platforms import device, output_hooks, training_hooks
    from megatron_hammer.training.cluster.agreement import require_equal_ranks
    from megatron_hammer.training.forward_step import ForwardStep
    from megatron_hammer.training.observer import build_observer
    from megatron_hammer.training.saving.retention import wait_for_removals
    from megatron_hammer.training.supervision.ending import finish_together

    device.stand_alone()
    state = finalize_arguments(arguments)
    # Ctrl-C, SIGTERM and a scheduler's warning too, since --exit-signal names only one.
    received = training_hooks.stop_on_signals_too(list_stop_signals())
    training_hooks.form_process_group()
    require_equal_ranks(plan, arguments.settings.flags)
    plan = agree_on_checkpoint(plan, state, terminal)
    lock = take_save_dir(plan)
    keep_save_dir_tidy(plan, terminal)
    exit_code, is_stopped = 0, False
    config = build_config_container(arguments, build_model_config)
    guard_saves(plan, lock)
    observer = build_observer(plan, state, terminal)
    training_hooks.observe_training(observer)
    training_hooks.observe_saves(observer)
    training_hooks.follow_progress(progress)
    if plan.output.tensorboard_dir is not None:
        output_hooks.lose_tensorboard_events()
    finish_wandb = output_hooks.postpone_wandb_finish()
    fill_from_initial_model(plan, state, terminal)
    datasets = build_dataset_provider(arguments, plan, state)
    fingerprints = build_fingerprints(plan)
    judge = build_judge(plan, state, observer)
    forward_step = ForwardStep(
        plan,
        add_loss=None if judge is None else judge.add_loss,
        add_batch=None if fingerprints is None else fingerprints.add_batch,
    )
    try:
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:
        report_early_stop(observer, stop)
        exit_code, is_stopped = choose_common_exit_code(received, device.max_over_ranks), True
    observer.wait_for_scores(is_stopped=lambda: is_stopped or bool(received), on_wait=lambda: progress.enter("ending"))

    def finish() -> None:
        # Also after an early stop: the curve and the summary then cover the steps that were run.
        observer.finish()
        remove_scored(plan)
        wait_for_removals()
        if lock is not None:
            lock.release()
        finish_wandb()  # last, since it may wait for its server

    finish_together(
        finish,
        max_over_ranks=device.max_over_ranks,
        on_wait=lambda: progress.enter("ending"),
        say=observer.reporter.say,
    )
    close_process_group()
    if judge is not None:
        judge.end_run()
    return exit_code


def build_judge(plan: "RunPlan", state: "TrainingState", observer: "RunObserver") -> "StepJudge | None":
    """Have every step judged before it changes the weights; None where the flags leave that to others."""
    from pathlib import Path

    from megatron_hammer.platforms import training_hooks
    from megatron_hammer.training.supervision.bad_steps import StepJudge

    if not plan.bad_loss.is_judged:
        return None
    save = plan.checkpoints.save
    judge = StepJudge(
        plan.bad_loss,
        state,
        None if save is None else Path(save),
        is_recorder=observer.is_recorder,
        say=observer.reporter.say,
        device=plan.machine.platform,
        save_interval=plan.checkpoints.save_interval,
    )
    training_hooks.judge_steps(judge)
    return judge


def build_fingerprints(plan: "RunPlan") -> "FingerprintFile | None":
    """Have every step's batch, gradients and weights recorded as hashes; None without --fingerprint-interval."""
    from pathlib import Path

    from megatron_hammer.platforms import training_hooks
    from megatron_hammer.training import fingerprints

    output = plan.output
    if output.fingerprint_interval is None or output.metrics_path is None:
        return None
    folder = Path(output.metrics_path).parent / fingerprints.FOLDER
    record = fingerprints.FingerprintFile(folder, plan.machine.rank, output.fingerprint_interval)
    training_hooks.take_fingerprints(record)
    return record


def agree_on_checkpoint(plan: "RunPlan", state: "TrainingState", terminal: IO[str]) -> "RunPlan":
    """The plan with the checkpoint that all ranks have verified, which is then the one that megatron loads."""
    from megatron_hammer.config.saved_run import find_checkpoint_to_load
    from megatron_hammer.platforms import training_hooks
    from megatron_hammer.training.saving import resumption

    plan = resumption.agree_on_checkpoint(plan, terminal)
    choice, folder = plan.checkpoints.agreed, find_checkpoint_to_load(plan.checkpoints)
    if choice is not None and choice.directory is not None and folder is not None:
        state.load_iteration(choice.iteration)
        training_hooks.load_iteration(folder, choice.iteration)
    return plan


def keep_save_dir_tidy(plan: "RunPlan", terminal: IO[str]) -> None:
    """Remove what killed runs left unfinished in --save, now, and older checkpoints after each save; on rank 0."""
    from pathlib import Path

    from megatron_hammer.checkpoint_files.iterations import remove_leftovers
    from megatron_hammer.platforms.iteration_publishing import after_each_save

    checkpoints = plan.checkpoints
    if checkpoints.save is None or plan.machine.rank != 0:
        return
    for name in remove_leftovers(Path(checkpoints.save)):
        print(f"{checkpoints.save}: removed {name}, which was interrupted", file=terminal, flush=True)
    retainer = build_retainer(plan)
    if retainer is not None:
        after_each_save(retainer)


def build_retainer(plan: "RunPlan") -> "Retainer | None":
    """What removes older checkpoints; None where all are kept. Those that --evaluate-every has yet to evaluate stay."""
    from pathlib import Path

    from megatron_hammer.training.checkpoint_scores import find_scores_path, select_unscored
    from megatron_hammer.training.saving.retention import Retainer, read_rule

    checkpoints, every, metrics_path = plan.checkpoints, plan.evaluation.scored_every_steps, plan.output.metrics_path
    if checkpoints.save is None or checkpoints.keep_last is None:
        return None
    loaded_dir = None if checkpoints.agreed is None else checkpoints.agreed.directory
    save_dir, rule = Path(checkpoints.save), read_rule(checkpoints)
    if every is None or metrics_path is None:
        return Retainer(save_dir, rule, loaded_dir)
    select = functools.partial(
        select_unscored, scores_path=find_scores_path(Path(metrics_path)), every=every, last_step=plan.num_steps
    )
    return Retainer(save_dir, rule, loaded_dir, select)


def remove_scored(plan: "RunPlan") -> None:
    """Remove the older checkpoints that only the evaluation still needed, once it has ended after the last save."""
    from pathlib import Path

    retainer = build_retainer(plan) if plan.machine.rank == 0 else None
    if retainer is not None and plan.checkpoints.save is not None and plan.evaluation.scored_every_steps is not None:
        retainer(Path(plan.checkpoints.save))


def take_save_dir(plan: "RunPlan") -> "RunLock | None":
    """The lock on --save, which rank 0 gets; raises on every rank if another run writes there."""
    from pathlib import Path

    from megatron_hammer.platforms.agreement import ask_first_rank
    from megatron_hammer.training.saving.lock import RunLock

    save_dir, taken = plan.checkpoints.save, []
    if save_dir is not None:
        ask_first_rank(lambda: taken.append(RunLock(Path(save_dir))))
    return taken[0] if taken else None


def guard_saves(plan: "RunPlan", lock: "RunLock | None") -> None:
    """One sentence where a checkpoint cannot be written, and none is begun where there is no room for it."""
    if plan.checkpoints.save is not None:
        from megatron_hammer.platforms import output_hooks
        from megatron_hammer.training.saving.failures import explain, require_room

        output_hooks.guard_saves(lambda: require_room(plan, lock), lambda error: explain(error, plan))


def fill_from_initial_model(plan: "RunPlan", state: "TrainingState", terminal: IO[str]) -> None:
    """Have megatron's new model filled with the weights of --load-hf, unless there is a checkpoint to continue."""
    from megatron_hammer.config.saved_run import find_checkpoint_to_load
    from megatron_hammer.platforms import training_hooks

    if plan.initial_model is not None and find_checkpoint_to_load(plan.checkpoints) is None:
        from megatron_hammer.training.initial_model import build_filler

        fill = build_filler(plan.initial_model, rank=plan.machine.rank, terminal=terminal)
        # megatron may have found a checkpoint elsewhere, such as --non-persistent-global-ckpt-dir
        training_hooks.fill_new_model(lambda *built: None if state.iteration else fill(*built))


def report_early_stop(observer: "RunObserver", stop: SystemExit) -> None:
    """megatron leaves its loop by exit(0) on a signal, a time limit or --exit-interval; say where the run stands."""
    # Another exit code is an error of megatron's and must reach the launcher.
    if stop.code not in (0, None):
        raise stop
    observer.report_early_stop()


def close_process_group() -> None:
    """Leave no process waiting for another."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
