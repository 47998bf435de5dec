"""The observer with a fake loop: what each rank does, and what the recording rank writes and prints."""

import argparse
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hammer.config.training_state import TrainingState
from megatron_hammer.training.metrics import RunFacts, read_metrics
from megatron_hammer.training.observer import RunObserver
from megatron_hammer.training.reporter import Reporter

FACTS = RunFacts(
    description="toy",
    train_steps=6,
    seq_length=32,
    world_size=2,
    flops_per_token=1000,
    peak_tflops=None,
    device_name="CPU process",
)


class Run:
    """An observer, the arguments that Megatron changes, the text it writes and the values that every rank reduced."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        is_recorder: bool = True,
        has_metrics: bool = True,
        save: str | None = None,
        set_names: tuple[str, ...] = (),
        **values,
    ):
        self.metrics_path = tmp_path / "metrics.jsonl"
        defaults = {
            "iteration": 0,
            "consumed_train_samples": 0,
            "global_batch_size": 4,
            "eval_iters": 10,
        }
        self.namespace = argparse.Namespace(**defaults | values)
        self.stream = io.StringIO()
        self.reduced: list[float] = []
        plan: Any = SimpleNamespace(
            output=SimpleNamespace(metrics_path=str(self.metrics_path) if has_metrics else None),
            checkpoints=SimpleNamespace(save=save, load=None, pretrained=None),
            evaluation=SimpleNamespace(set_names=set_names),
            initial_model=None,
        )
        self.observer = RunObserver(
            plan,
            TrainingState(self.namespace),
            FACTS,
            Reporter(self.stream, FACTS),
            is_recorder=is_recorder,
            read_peak_memory_bytes=lambda: 11,
            max_over_ranks=self.find_max,
        )

    def find_max(self, value: float) -> float:
        self.reduced.append(value)
        return value + 2.0  # another rank needs more

    def step(self, step: int, losses: dict | None = None, lr: float = 1e-3) -> None:
        self.observer.begin_step([{"lr": lr}, {"lr": None}, {"lr": lr / 10}])
        self.namespace.consumed_train_samples += self.namespace.global_batch_size
        losses = {"lm loss": torch.tensor(2.0 / step)} if losses is None else losses
        self.observer.end_step(step=step, losses=losses, grad_norm=1.5, loss_scale=1.0, is_skipped=False)

    def evaluate(self, step: int, num_sets: int, *, is_test: bool = False) -> None:
        self.observer.begin_evaluation()
        for index in range(num_sets):
            losses = {"lm loss": torch.tensor(1.0 + index)}
            self.observer.end_evaluation_of_set(step=step, is_test=is_test, losses=losses)

    def validation_sets(self) -> list[str]:
        return [line["validation_set"] for line in read_metrics(self.metrics_path.with_name("validation.jsonl"))]


def test_a_step_is_written_with_the_heaviest_rank_and_the_highest_lr(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1)
    run.step(2, lr=5e-4)
    run.observer.finish()
    first, second = read_metrics(run.metrics_path)
    assert (first["loss"], first["lr"], first["peak_memory_bytes"], first["num_samples"]) == (2.0, 1e-3, 13, 4)
    assert (second["loss"], second["lr"], second["num_tokens"]) == (1.0, 5e-4, 256)
    assert 0 < first["step_time_s"] < 60
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert "1 to 2 of 6" in run.stream.getvalue()


def test_other_ranks_only_take_part_in_the_reductions(tmp_path: Path) -> None:
    run = Run(tmp_path, is_recorder=False)
    for step in (1, 2):
        run.step(step, losses={})
    run.evaluate(2, num_sets=1)
    run.observer.finish()
    assert run.reduced == [11.0, 11.0]  # as often as the recording rank, or the collective would hang
    assert list(tmp_path.iterdir()) == []
    assert run.stream.getvalue() == ""


@pytest.mark.parametrize(
    ("values", "num_sets", "names"),
    [
        ({}, 1, ["validation"]),
        ({"eval_iters": [4]}, 1, ["validation"]),
        (
            {"eval_iters": [4, 5, 6]},
            3,
            ["validation-0", "validation-1", "validation-2"],
        ),
        ({"set_names": ["code", "prose"]}, 2, ["code", "prose"]),
    ],
)
def test_names_of_validation_sets(tmp_path: Path, values: dict, num_sets: int, names: list[str]) -> None:
    run = Run(tmp_path, **values)
    for step in (2, 4):  # the names start again with every evaluation
        run.evaluate(step, num_sets)
    run.evaluate(4, 1, is_test=True)
    run.observer.finish()
    assert run.validation_sets() == [*names, *names, "test"]


def test_a_set_without_our_loss_is_not_recorded(tmp_path: Path) -> None:
    run = Run(tmp_path, set_names=["code", "prose"])
    run.observer.begin_evaluation()
    run.observer.end_evaluation_of_set(step=1, is_test=False, losses={})
    run.observer.end_evaluation_of_set(step=1, is_test=False, losses={"lm loss": torch.tensor(1.0)})
    run.observer.finish()
    assert run.validation_sets() == ["prose"]


def test_a_resumed_run_reports_it_and_drops_the_repeated_steps(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for step in (1, 2, 3):
        first.step(step)
    first.observer.finish()
    second = Run(tmp_path, iteration=1, consumed_train_samples=4)
    second.step(2)
    second.observer.finish()
    text = second.stream.getvalue()
    assert "resumed from the checkpoint of step 1\n" in text
    assert "metrics: dropped 2 lines of steps after the checkpoint; they run again\n" in text
    assert [line["step"] for line in read_metrics(second.metrics_path)] == [1, 2]


@pytest.mark.parametrize(
    ("save", "fate"),
    [
        (None, "nothing was saved: pass --save DIR to continue a stopped run"),
        ("out/run", "saved to out/run; the same command continues from there"),
    ],
)
def test_early_stop(tmp_path: Path, save: str | None, fate: str) -> None:
    run = Run(tmp_path, save=save)
    run.step(1)
    run.step(2)
    run.observer.report_early_stop()
    assert run.stream.getvalue().endswith(f"stopped after step 2 of 6, {fate}\n")


def test_early_stop_before_the_first_step(tmp_path: Path) -> None:
    run = Run(tmp_path, save="out/run", iteration=3)
    run.observer.report_early_stop()
    assert "stopped after step 3 of 6" in run.stream.getvalue()
    run.observer.finish()
    assert list(tmp_path.iterdir()) == []


def test_without_metrics_path_only_the_terminal_gets_output(tmp_path: Path) -> None:
    run = Run(tmp_path, has_metrics=False)
    run.step(1)
    run.evaluate(1, 1)
    run.observer.finish()
    assert "1 to 1 of 6" in run.stream.getvalue()
    assert list(tmp_path.iterdir()) == []


class CountingScorer:
    """In the place of CheckpointScorer: busy for some polls."""

    def __init__(self, num_busy: int):
        self.num_busy, self.calls = num_busy, []

    def is_busy(self) -> bool:
        self.num_busy -= 1
        return self.num_busy >= 0

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, *values))


@pytest.mark.parametrize("has_stopped", [False, True])
def test_all_ranks_wait_for_the_scores_of_a_run_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_stopped: bool
) -> None:
    """Also of a run that has no step left and was started again for them."""
    monkeypatch.setattr("megatron_hammer.training.observer.SCORES_POLL_INTERVAL_S", 0.0)
    run, scorer, reduced = Run(tmp_path, iteration=6), CountingScorer(2), []
    run.observer.plan.evaluation.scored_every_steps = 2
    run.observer._scorer = scorer
    run.observer._max_over_ranks = lambda value: reduced.append(value) or value
    waits: list[int] = []
    run.observer.wait_for_scores(is_stopped=lambda: has_stopped, on_wait=lambda: waits.append(1))
    run.observer.finish()
    assert reduced == ([0.0] if has_stopped else [1.0, 1.0, 0.0])
    assert len(waits) == len(reduced) - 1
    assert scorer.calls == ([] if has_stopped else [("begin", 7), ("finish",)])
    assert (tmp_path / "loss.png").exists() is not has_stopped  # drawn again, with the scores
