"""Listens to megatron's training loop and turns what it hears into metrics and terminal output.

megatron calls (through platforms/training_hooks.py) on every rank; the last rank holds the loss and does the
recording. Reading the loss ends a step: it waits for the device, so the step time needs no other synchronisation.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_hammer.checkpoint_files.checkpoint_reader import name_folder
from megatron_hammer.checkpoint_files.iterations import count_bytes
from megatron_hammer.config.evaluation_suite import read_suite
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.config.saved_run import describe_weights
from megatron_hammer.config.training_state import TrainingState
from megatron_hammer.data.order.review import describe_continuation
from megatron_hammer.errors import OutputError
from megatron_hammer.model.accounting import count_flops_per_token, count_parameters
from megatron_hammer.platforms.device import max_over_ranks, read_device_name, read_peak_memory_bytes
from megatron_hammer.platforms.gpu_peaks import find_dense_peak_tflops
from megatron_hammer.platforms.output_hooks import log_values
from megatron_hammer.training.checkpoint_scores import CheckpointScorer, find_scores_path, read_scores
from megatron_hammer.training.metrics import MFU_CONVENTION, MetricsLog, RunFacts, Stopwatch, read_metrics
from megatron_hammer.training.reporter import Reporter, write_loss_curve
from megatron_hammer.training.supervision.heartbeat import Heartbeat

LOSS_NAME = "lm loss"  # the key of forward_step.sum_loss
SCORES_POLL_INTERVAL_S = 0.2
SHARE_NAMES = {"learned_share": "learned share", "padding_share": "padding share"}  # its keys with conversations


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # of the parameters, as torch names them


def build_observer(plan: RunPlan, state: TrainingState, terminal: IO[str]) -> "RunObserver":
    """The observer of a run. terminal: where a person reads."""
    machine = plan.machine
    device_name = read_device_name(machine.platform)
    facts = RunFacts(
        description=describe_run(plan),
        train_steps=plan.num_steps,
        seq_length=plan.seq_length,
        world_size=machine.world_size,
        flops_per_token=count_flops_per_token(plan.model, plan.seq_length, MFU_CONVENTION),
        peak_tflops=machine.peak_tflops or find_dense_peak_tflops(device_name),
        device_name=device_name,
    )
    reporter = Reporter(terminal, facts)
    return RunObserver(
        plan,
        state,
        facts,
        reporter,
        # The last rank is in the last pipeline stage, and only that stage has the loss.
        is_recorder=machine.rank == machine.world_size - 1,
        read_peak_memory_bytes=read_peak_memory_bytes,
        max_over_ranks=max_over_ranks,
        heartbeat=build_heartbeat(plan) if machine.rank == machine.world_size - 1 else None,
        scorer=build_scorer(plan, reporter) if machine.rank == machine.world_size - 1 else None,
    )


def build_scorer(plan: RunPlan, reporter: Reporter) -> CheckpointScorer | None:
    """For --evaluate-every; None without it."""
    every, suite_path, save = plan.evaluation.scored_every_steps, plan.evaluation.suite_path, plan.checkpoints.save
    if every is None or suite_path is None or save is None or plan.output.metrics_path is None:
        return None
    return CheckpointScorer(
        Path(save),
        Path(suite_path),
        find_scores_path(Path(plan.output.metrics_path)),
        every=every,
        last_step=plan.num_steps,
        time_limit_s=60 * read_suite(Path(suite_path)).time_limit_minutes,
        say=reporter.say,
        publish=log_values,
    )


def build_heartbeat(plan: RunPlan) -> Heartbeat:
    """For outside monitors; raises ConfigError if --prometheus-port is taken."""
    save, output = plan.checkpoints.save, plan.output
    return Heartbeat(
        plan.model_name if save is None else Path(save).name,
        None if save is None else Path(save),
        None if output.prometheus_file is None else Path(output.prometheus_file),
        output.prometheus_port,
    )


def describe_run(plan: RunPlan) -> str:
    """hammer-tiny: 4,851,968 parameters, 2 ranks (TP2 PP1 DP1), cpu platform, torch backend, float32"""
    sizes = {
        "TP": plan.layout.tensor_model_parallel_size,
        "PP": plan.layout.pipeline_model_parallel_size,
        "VP": plan.layout.virtual_pipeline_model_parallel_size,
        "CP": plan.layout.context_parallel_size,
        "EP": plan.layout.expert_model_parallel_size,
        "DP": plan.layout.data_parallel_size,
    }
    layout = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP"))
    machine = plan.machine
    ranks = "1 rank" if machine.world_size == 1 else f"{machine.world_size} ranks"
    return (
        f"{plan.model_name}: {count_parameters(plan.model):,} parameters, {ranks} ({layout}), "
        f"{machine.platform} platform, {machine.backend} backend, {DTYPES[plan.precision]}"
    )


class RunObserver:
    """What megatron's loop calls.

    is_recorder: whether this rank writes (the last one). max_over_ranks: collective maximum of a number, called by
    every rank in the same order.
    """

    def __init__(
        self,
        plan: RunPlan,
        state: TrainingState,
        facts: RunFacts,
        reporter: Reporter,
        *,
        is_recorder: bool,
        read_peak_memory_bytes: Callable[[], int],
        max_over_ranks: Callable[[float], float],
        heartbeat: Heartbeat | None = None,
        scorer: CheckpointScorer | None = None,
    ):
        self.plan, self.state, self.facts, self.reporter = plan, state, facts, reporter
        self.is_recorder = is_recorder
        # Now, since a run's own first checkpoint would be found later.
        self._weights = describe_weights(plan.checkpoints, plan.initial_model)
        self._read_peak_memory_bytes, self._max_over_ranks = read_peak_memory_bytes, max_over_ranks
        self._heartbeat, self._scorer = heartbeat, scorer
        self._stopwatch, self._lr = Stopwatch(), 0.0
        self._log: MetricsLog | None = None
        self._validations: list[dict[str, Any]] = []
        self._num_evaluated_sets = 0
        self._pending_saves: dict[int, float] = {}  # by step, how long training waited
        self._reported_failure: str | None = None

    # --- called by megatron's loop -----------------------------------------------------------------------------------

    def begin_step(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """A step starts; `param_groups` still hold the learning rate that it will apply."""
        # Only now: the step to resume from is known once Megatron has loaded the checkpoint.
        if self._log is None and self.is_recorder:
            self._open_log()
        self._lr = max((group["lr"] for group in param_groups if group.get("lr") is not None), default=0.0)
        self._stopwatch.start()

    def end_step(
        self, *, step: int, losses: dict[str, Any], grad_norm: float | None, loss_scale: float, is_skipped: bool
    ) -> None:
        """The optimizer has stepped. losses: {name: scalar tensor} on the last pipeline stage, else empty."""
        # float() waits for the device, so the stopwatch below measures the finished step.
        loss = float(losses[LOSS_NAME]) if LOSS_NAME in losses else None
        shares = {name: float(losses[key]) for name, key in SHARE_NAMES.items() if key in losses}
        step_time_s = self._stopwatch.elapsed_s()
        # Before the early return: every rank must take part in a collective.
        peak_memory_bytes = int(self._max_over_ranks(float(self._read_peak_memory_bytes())))
        if not self.is_recorder:
            return
        assert self._log is not None
        assert loss is not None
        metrics = self._log.add_step(
            step=step,
            loss=loss,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=self._lr,
            num_samples=self.state.num_samples,
            step_samples=self.state.global_batch_size,
            step_time_s=step_time_s,
            loss_scale=float(loss_scale),
            is_skipped=bool(is_skipped),
            peak_memory_bytes=peak_memory_bytes,
            **shares,
        )
        self._record_saves()
        if self._scorer is not None:
            self._scorer.poll()
        self._report_failure(self._log)
        self.reporter.show_step(metrics)
        if self._heartbeat is not None:
            self._heartbeat.beat(
                step=metrics.step,
                train_steps=self.facts.train_steps,
                loss=metrics.loss,
                tokens_per_s=metrics.tokens_per_s,
                step_time_s=metrics.step_time_s,
            )

    def end_save(self, step: int, elapsed_s: float) -> None:
        """Training goes on after a save, which may still be written."""
        if self.is_recorder:
            self._pending_saves[step] = elapsed_s
            self._record_saves()

    def begin_evaluation(self) -> None:
        """An evaluation starts; its sets follow one by one."""
        self._num_evaluated_sets = 0

    def end_evaluation_of_set(self, *, step: int, is_test: bool, losses: dict[str, Any]) -> None:
        """One validation or test set has been evaluated. losses as in `end_step`."""
        name = self._name_evaluated_set(is_test)
        self._num_evaluated_sets += 1
        if not self.is_recorder or LOSS_NAME not in losses:
            return
        if self._log is None:
            self._open_log()
        assert self._log is not None
        validation = self._log.add_validation(step=step, validation_set=name, loss=float(losses[LOSS_NAME]))
        self._validations.append(validation)
        self.reporter.show_validation(validation)

    # --- called by the main path -------------------------------------------------------------------------------------

    def wait_for_scores(self, *, is_stopped: Callable[[], bool], on_wait: Callable[[], object]) -> None:
        """On every rank: wait until the last checkpoints are scored, unless the run was stopped, as by a signal.

        All ranks wait, since a launcher takes a node whose ranks have ended for done. on_wait: called often meanwhile.
        """
        if self.plan.evaluation.scored_every_steps is None:
            return
        if self.is_recorder and self._log is None and not is_stopped():
            self._open_log()  # a run that had no step left, started again for the scores
        if self.is_recorder:
            self._record_saves()
        while self._max_over_ranks(float(self._scorer is not None and not is_stopped() and self._scorer.is_busy())):
            on_wait()
            time.sleep(SCORES_POLL_INTERVAL_S)

    def finish(self) -> None:
        """Close the files; write the loss curve; print the summary."""
        if self._heartbeat is not None:
            self._heartbeat.finish()
        self.reporter.stop()
        if not self.is_recorder or self._log is None:
            return
        self._record_saves()
        if self._scorer is not None:
            self._scorer.finish()
        self._log.close()
        metrics_path = self._metrics_path()
        curve_path = None
        if metrics_path is not None and (self._log.history or self._scorer is not None):
            curve_path = self._draw_curve(metrics_path)
        save_dir = self.plan.checkpoints.save
        self.reporter.show_summary(
            self._log.history,
            self._validations,
            {
                "metrics": metrics_path,
                "loss curve": curve_path,
                "checkpoints": None if save_dir is None else Path(save_dir),
            },
        )

    def _draw_curve(self, metrics_path: Path) -> Path | None:
        """The picture of the loss; None where the disk does not take it, which is no reason for a run to fail."""
        curve_path = metrics_path.with_name("loss.png")
        try:
            # From the files and not from the history, so the curve includes the steps before a resume.
            validations = read_metrics(metrics_path.with_name("validation.jsonl"))
            scores = read_scores(find_scores_path(metrics_path))
            write_loss_curve(read_metrics(metrics_path), validations, curve_path, scores)
        except (OSError, OutputError, ValueError, LookupError, TypeError) as error:  # also of a file that was edited
            self.reporter.say(f"loss curve: not written, {error or type(error).__name__}")
            return None
        return curve_path

    def _report_failure(self, log: MetricsLog) -> None:
        failure, self._reported_failure = self._reported_failure, log.failure
        if log.failure and not failure:
            self.reporter.say(f"metrics: {log.failure}")

    def report_early_stop(self) -> None:
        """Say where a run stands that stopped before its last step."""
        self.reporter.stop()
        if self.is_recorder:
            save_dir = self.plan.checkpoints.save
            fate = (
                "nothing was saved: pass --save DIR to continue a stopped run"
                if save_dir is None
                else f"saved to {save_dir}; the same command continues from there"
            )
            self.reporter.say(f"stopped after step {self.last_step} of {self.facts.train_steps}, {fate}")

    @property
    def last_step(self) -> int:
        return self._log.history[-1].step if self._log and self._log.history else self.state.iteration

    def _record_saves(self) -> None:
        """Write the line of every save whose folder has got its name, which it gets once it is complete."""
        save_dir = self.plan.checkpoints.save
        if self._log is None or save_dir is None:
            return
        for step in list(self._pending_saves):
            num_bytes = count_bytes(Path(save_dir) / name_folder(step))
            if num_bytes:
                self._log.add_save(
                    step=step,
                    name=name_folder(step),
                    save_time_s=self._pending_saves.pop(step),
                    save_bytes=num_bytes,
                )
                if self._scorer is not None:
                    self._scorer.add(step)

    def _metrics_path(self) -> Path | None:
        path = self.plan.output.metrics_path
        return None if path is None else Path(path)

    def _open_log(self) -> None:
        first_step = self.state.iteration + 1
        self.reporter.say(self.facts.description)
        self.reporter.say(f"weights: {self._weights}")
        self._log = MetricsLog(self.facts, self._metrics_path(), first_step)
        if first_step > 1:
            self.reporter.say(f"resumed from the checkpoint of step {first_step - 1}")
            order_line = describe_continuation(self.state.data_order, self.state.num_samples)
            if order_line is not None:
                self.reporter.say(order_line)
        if self._log.num_dropped:
            self.reporter.say(
                f"metrics: dropped {self._log.num_dropped} lines of steps after the checkpoint; they run again"
            )
        if self._scorer is not None:
            self._scorer.begin(first_step)
        self.reporter.start(first_step)

    def _name_evaluated_set(self, is_test: bool) -> str:
        if is_test:
            return "test"
        names = self.plan.evaluation.set_names
        if names:
            return names[self._num_evaluated_sets]
        return f"validation-{self._num_evaluated_sets}" if self.state.num_validation_sets > 1 else "validation"
