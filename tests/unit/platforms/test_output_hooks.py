from typing import Any

import pytest

from megatron_hammer.platforms.output_hooks import log_values, postpone_wandb_finish


class Recorder:
    """Takes the calls that TensorBoard's writer and the wandb module take."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **options: self.calls.append((name, *values, *options.items()))


def test_scores_go_where_megatron_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    writer, wandb = Recorder(), Recorder()
    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(training, "get_wandb_writer", lambda: wandb)
    log_values({"piqa/acc": 0.5}, 10)
    assert writer.calls == [("add_scalar", "evaluation/piqa/acc", 0.5, 10), ("flush",)]
    # With a step of its own: Weights & Biases refuses values of steps before the current one.
    assert wandb.calls == [
        ("define_metric", "evaluation/*", ("step_metric", "evaluation/step")),
        ("log", {"evaluation/step": 10, "evaluation/piqa/acc": 0.5}, ("commit", False)),
    ]
    finish = postpone_wandb_finish()
    wandb.finish()
    assert wandb.calls[2:] == []
    finish()
    assert wandb.calls[2:] == [("finish",)]


def test_a_run_without_either_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import training

    monkeypatch.setattr(training, "get_tensorboard_writer", lambda: None)
    monkeypatch.setattr(training, "get_wandb_writer", lambda: None)
    log_values({"piqa/acc": 0.5}, 10)
    postpone_wandb_finish()()
