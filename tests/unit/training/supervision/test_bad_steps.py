"""Which steps the judge lets through, in a process group of one rank."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hammer.config.run_plan import BadLossPolicy
from megatron_hammer.errors import CheckpointError
from megatron_hammer.training.supervision.bad_steps import (
    MAX_SKIPPED_IN_A_ROW,
    MIN_MEDIAN_STEPS,
    SKIPPED_BATCHES_FILE,
    BadStepError,
    StepJudge,
    read_skipped,
)

BATCH_SIZE = 8


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Run:
    """Steps of a run that a judge sees; a batch is BATCH_SIZE samples."""

    def __init__(self, folder: Path | None, action: Any, spike_factor: float | None = None, num_rolled_back: int = 1):
        policy = BadLossPolicy(
            action=action, spike_factor=spike_factor, num_rolled_back=num_rolled_back, is_judged=True
        )
        self.state: Any = SimpleNamespace(num_samples=0)
        self.said: list[str] = []
        self.judge = StepJudge(
            policy, self.state, folder, is_recorder=True, say=self.said.append, device="cpu", save_interval=4
        )
        self.step = 0

    def take_step(self, loss: float, *, norm: float = 1.0, num_tokens: int = 10) -> bool:
        self.step += 1
        self.judge.begin_step(self.step)
        for _ in range(2):  # micro-batches
            self.judge.add_loss(torch.tensor([loss * num_tokens, num_tokens]))
        self.judge.add_norm(torch.tensor(norm))
        is_permitted = self.judge.permits_update()
        self.state.num_samples += BATCH_SIZE
        return is_permitted


@pytest.mark.parametrize(("loss", "norm"), [(torch.nan, 1.0), (torch.inf, 1.0), (2.0, torch.nan), (2.0, torch.inf)])
def test_a_step_that_is_not_finite_stops_the_run(loss: float, norm: float, tmp_path: Path) -> None:
    run = Run(tmp_path, "stop")
    assert run.take_step(2.0)
    assert run.take_step(2.0)
    assert not run.judge.has_ended_run
    assert not run.take_step(loss, norm=norm)
    assert run.judge.has_ended_run
    assert run.judge.must_save()
    with pytest.raises(BadStepError, match=r"step 3: .* first sample is number 16"):
        run.judge.end_run()


def test_nothing_is_saved_twice(tmp_path: Path) -> None:
    first, at_interval = Run(tmp_path, "stop"), Run(tmp_path, "stop")
    first.take_step(torch.nan)
    assert not first.judge.must_save()  # the weights of the beginning
    for _ in range(4):
        at_interval.take_step(2.0)
    at_interval.take_step(torch.nan)
    assert not at_interval.judge.must_save()


def test_a_spike_needs_a_history(tmp_path: Path) -> None:
    run = Run(tmp_path, "skip-batch", spike_factor=3.0)
    assert all(run.take_step(loss) for loss in [2.0, 60.0] + [2.0] * (MIN_MEDIAN_STEPS - 2))
    assert run.take_step(5.9)
    assert not run.take_step(6.1)
    assert run.take_step(5.9)
    assert [batch.step for batch in read_skipped(tmp_path / SKIPPED_BATCHES_FILE)] == [MIN_MEDIAN_STEPS + 2]


def test_broken_weights_are_not_skipped_for_ever(tmp_path: Path) -> None:
    run = Run(tmp_path, "skip-batch")
    run.take_step(2.0)
    for _ in range(MAX_SKIPPED_IN_A_ROW):
        assert not run.take_step(torch.nan)
        assert not run.judge.has_ended_run
    run.take_step(torch.nan)
    assert not run.judge.must_save()
    with pytest.raises(BadStepError, match="the weights are at fault"):
        run.judge.end_run()
    assert len(run.said) == MAX_SKIPPED_IN_A_ROW


def test_a_roll_back_leaves_out_the_batches_before_it_too(tmp_path: Path) -> None:
    run = Run(tmp_path, "roll-back", num_rolled_back=3)
    assert [run.take_step(loss) for loss in (2.0, 2.0, 2.0, 2.0, torch.nan)] == [True] * 4 + [False]
    assert not run.judge.must_save()
    with pytest.raises(SystemExit, match="1"):
        run.judge.end_run()
    again = Run(tmp_path, "roll-back", num_rolled_back=3)
    assert [again.take_step(2.0) for _ in range(6)] == [True, True, False, False, False, True]
    assert not again.judge.has_ended_run
    assert "the batch is skipped, as before: rank 0 (" in again.said[0]


def test_a_run_without_a_folder_is_judged_too() -> None:
    run = Run(None, "skip-batch")
    assert [run.take_step(loss) for loss in (2.0, torch.nan, 2.0)] == [True, False, True]


def test_the_file_of_skipped_batches_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / SKIPPED_BATCHES_FILE
    good = '{"step": 3, "num_samples": 16, "reason": "rank 0: loss is nan"}\n'
    assert read_skipped(path) == []
    path.write_text(good + good[:20])  # cut off by a kill
    assert [batch.num_samples for batch in read_skipped(path)] == [16]
    path.write_text('{"step": "3"}\n' + good)
    with pytest.raises(CheckpointError, match=f"{SKIPPED_BATCHES_FILE}:1: "):
        read_skipped(path)


def test_a_batch_is_recorded_on_a_line_of_its_own(tmp_path: Path) -> None:
    """Also after a line whose end an editor has left out."""
    (tmp_path / SKIPPED_BATCHES_FILE).write_text('{"step": 9, "num_samples": 64, "reason": "x"}')
    run = Run(tmp_path, "skip-batch")
    assert not run.take_step(float("nan"))
    assert [batch.step for batch in read_skipped(tmp_path / SKIPPED_BATCHES_FILE)] == [9, 1]
