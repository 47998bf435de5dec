"""Every figure of metrics.jsonl follows its definition, and the file stays whole over kills and resumes."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.training.metrics import (
    ETA_WINDOW_STEPS,
    LineFile,
    MetricsLog,
    RunFacts,
    StepMetrics,
    drop_lines_from,
    read_metrics,
)

FACTS = RunFacts(
    description="toy",
    train_steps=50,
    seq_length=128,
    world_size=4,
    flops_per_token=6_000_000,
    peak_tflops=0.25,
    device_name="toy GPU",
)
NO_PEAK = RunFacts(
    description="toy",
    train_steps=50,
    seq_length=128,
    world_size=4,
    flops_per_token=6_000_000,
    peak_tflops=None,
    device_name="CPU process",
)


def add_step(log: MetricsLog, step: int, *, step_time_s: float = 0.5, loss: float = 2.5) -> StepMetrics:
    return log.add_step(
        step=step,
        loss=loss,
        grad_norm=1.25,
        lr=3e-4,
        num_samples=16 * step,
        step_samples=16,
        step_time_s=step_time_s,
        loss_scale=1.0,
        is_skipped=False,
        peak_memory_bytes=7,
    )


def test_rates_follow_from_their_definitions() -> None:
    metrics = add_step(MetricsLog(FACTS, None, 1), 3)
    assert metrics.num_tokens == 3 * 16 * 128
    assert metrics.step_tokens == 2048
    assert metrics.tokens_per_s == 4096.0
    assert metrics.tokens_per_s_per_gpu == 1024.0
    assert metrics.model_tflops_per_gpu == pytest.approx(1024 * 6e6 / 1e12)
    assert metrics.mfu == pytest.approx(1024 * 6e6 / 1e12 / 0.25)
    assert (metrics.mfu_convention, metrics.peak_tflops) == ("A", 0.25)


def test_without_a_peak_there_is_no_mfu(tmp_path: Path) -> None:
    log = MetricsLog(NO_PEAK, tmp_path / "metrics.jsonl", 1)
    add_step(log, 1)
    log.close()
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert line["mfu"] is None
    assert line["peak_tflops"] is None
    assert line["model_tflops_per_gpu"] > 0


def test_eta_is_the_mean_of_the_last_steps_times_what_is_left() -> None:
    log = MetricsLog(FACTS, None, 1)
    add_step(log, 1, step_time_s=100.0)  # the slow first step leaves the window in time
    assert add_step(log, 2, step_time_s=1.0).eta_s == pytest.approx(48 * 50.5)
    for step in range(3, 3 + ETA_WINDOW_STEPS):
        metrics = add_step(log, step, step_time_s=2.0)
    assert metrics.eta_s == pytest.approx((50 - metrics.step) * 2.0)
    assert add_step(log, 50).eta_s == 0.0


def test_a_line_is_the_step_as_it_was_computed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(FACTS, path, 1)
    metrics = add_step(log, 1, loss=1 / 3)
    assert json.loads(path.read_text())["loss"] == 1 / 3  # there before the file is closed, and every digit of it
    log.close()
    assert StepMetrics(**read_metrics(path)[0]) == metrics == log.history[0]


def test_a_resumed_run_appends_and_drops_the_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(FACTS, path, 1)
    for step in range(1, 8):
        add_step(first, step)
    first.add_validation(step=4, validation_set="validation", loss=1.0)
    first.add_validation(step=6, validation_set="validation", loss=0.5)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "los')  # killed while it wrote
    second = MetricsLog(FACTS, path, 5)
    assert second.num_dropped == 4
    add_step(second, 5, loss=9.0)
    second.close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] == 9.0
    assert [line["step"] for line in read_metrics(tmp_path / "validation.jsonl")] == [4]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "validation.jsonl"]


def test_a_file_that_keeps_every_line_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":  2}\n')
    before = path.stat().st_ino
    assert drop_lines_from(path, 3) == 0
    assert path.stat().st_ino == before
    assert drop_lines_from(tmp_path / "none.jsonl", 3) == 0


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert drop_lines_from(path, 3) == 1
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("foreign", ["hello", "[1]", '{"epoch": 1}', "7"])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{foreign}\n{{"step": 3}}\n'
    path.write_text(content)
    with pytest.raises(DataError, match=r"metrics.jsonl:2: must be one JSON object with a step, got "):
        drop_lines_from(path, 2)
    assert path.read_text() == content


def test_validation_carries_its_perplexity(tmp_path: Path) -> None:
    log = MetricsLog(FACTS, tmp_path / "metrics.jsonl", 1)
    log.add_validation(step=5, validation_set="code", loss=2.0)
    log.close()
    line = read_metrics(tmp_path / "validation.jsonl")[0]
    assert line == {"step": 5, "validation_set": "code", "loss": 2.0, "perplexity": math.exp(2.0)}


def test_a_step_that_is_evaluated_again_after_a_kill_keeps_its_line(tmp_path: Path) -> None:
    for loss in (2.0, 3.0):
        log = MetricsLog(FACTS, tmp_path / "metrics.jsonl", 6)
        log.add_validation(step=5, validation_set="code", loss=loss)
        log.add_validation(step=5, validation_set="web", loss=loss)
        log.close()
    lines = read_metrics(tmp_path / "validation.jsonl")
    assert [(line["validation_set"], line["loss"]) for line in lines] == [("code", 2.0), ("web", 2.0)]


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    log = MetricsLog(FACTS, None, 1)
    assert log.add_validation(step=1, validation_set="v", loss=1e4)["perplexity"] == math.inf


def test_lines_that_the_disk_does_not_take_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(Path("/dev/full"))
    lines.append({"step": 1, "loss": 1.5})
    assert lines.failure is not None
    assert "/dev/full: No space left on device; training continues" in lines.failure
    lines._file = path.open("ab", buffering=0)  # there is room again
    lines.append({"step": 2, "loss": 1.5})
    assert lines.failure is None
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_half_a_line_does_not_stay(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "loss": 1.5})
    whole = lines._file
    assert whole is not None
    lines._file = mock.Mock(wraps=whole, write=lambda data: whole.write(data[:5]))  # as where a disk fills up
    lines.append({"step": 2, "loss": 1.5})
    assert lines.failure is not None
    lines._file = whole
    lines.append({"step": 3, "loss": 1.5})
    assert [line["step"] for line in read_metrics(lines.path)] == [1, 2, 3]


def test_a_deleted_file_is_begun_anew(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        lines.append({"step": step})
    shutil.rmtree(tmp_path / "run")
    lines.append({"step": 3, "loss": 1.5})
    assert lines.failure is not None
    assert "was deleted" in lines.failure
    assert [line["step"] for line in read_metrics(lines.path)] == [3]


def test_a_last_line_without_its_end_keeps_it_apart_from_the_next(tmp_path: Path) -> None:
    """As an editor may leave it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}')
    assert drop_lines_from(path, 3) == 0
    lines = LineFile(path)
    lines.append({"step": 2, "loss": 1.5})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("line", ['{"step": 1}', '{"step": 1, "loss": "x"}', '{"step": 1, "loss": 1.5}'])
def test_a_line_that_could_not_be_drawn_is_named_before_the_run(tmp_path: Path, line: str) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"validation.jsonl:1: must be one JSON object with a step and loss and valid"):
        MetricsLog(FACTS, tmp_path / "metrics.jsonl", 2)
