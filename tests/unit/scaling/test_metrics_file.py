"""Lines of a training that was killed, and of a file that no training wrote."""

import math
from pathlib import Path

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.scaling.metrics_file import read_metrics
from tests.helpers.messages import raises_problem


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.5, "lr": 0.1}\n{"step": 3, "lo')
    first, second = read_metrics(path, "step", "loss")
    assert (first["step"], second) == (1, {"step": 2, "loss": 3.5, "lr": 0.1})


@pytest.mark.parametrize("line", ["nonsense", "[1]", "3", '"step, loss"', '{"step": 2}'])
def test_any_other_line_must_be_a_step(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": 2.0}}\n')
    with raises_problem(DataError, f"{path}:2:", "step and loss", f"got {line!r}"):
        read_metrics(path, "step", "loss")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with raises_problem(DataError, f"{tmp_path / 'absent.jsonl'}:", "No such file"):
        read_metrics(tmp_path / "absent.jsonl", "step")


def test_checkpoints_are_no_steps_and_a_loss_of_null_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n{"step": 1, "saved": "iter_0000001"}\n{"step": 2, "loss": 3.5}\n')
    first, second = read_metrics(path, "step", "loss")
    assert math.isnan(first["loss"])
    assert second["step"] == 2
