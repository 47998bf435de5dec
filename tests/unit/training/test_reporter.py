"""Terminal output of a run: one line per step or a live bar, then a table and a loss curve."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hammer.training import reporter as reporter_module
from megatron_hammer.training.metrics import MetricsLog, RunFacts, StepMetrics
from megatron_hammer.training.reporter import (
    Reporter,
    describe_step,
    draw_scores,
    format_count,
    format_duration,
    summarize,
    write_loss_curve,
)

PEAK_TFLOPS = 0.25
VALIDATION = {"step": 4, "validation_set": "code", "loss": 1.5, "perplexity": 4.4817}


def make_facts(peak_tflops: float | None = None) -> RunFacts:
    return RunFacts(
        description="toy",
        train_steps=9,
        seq_length=128,
        world_size=4,
        flops_per_token=6_000_000,
        peak_tflops=peak_tflops,
        device_name="toy GPU",
    )


def make_history(peak_tflops: float | None = None, num_steps: int = 5, **changes) -> list[StepMetrics]:
    """Steps of 10, 2, 3, 4, ... seconds; the first one warms up."""
    log = MetricsLog(make_facts(peak_tflops), None, 1)
    for step in range(1, num_steps + 1):
        values = {"loss": 8.0 / step, "grad_norm": 1.5, "lr": 1e-3, "loss_scale": 1.0, "is_skipped": False} | changes
        log.add_step(
            step=step,
            num_samples=16 * step,
            step_samples=16,
            step_time_s=10.0 if step == 1 else float(step),
            peak_memory_bytes=step * 2**30,
            **values,
        )
    return log.history


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (12_345, "12.3k"), (1_234_567, "1.2M"), (5e9, "5.0G")]
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (83, "1:23"),
        (3599, "59:59"),
        (3725, "1:02:05"),
        (86_400, "1d 00:00"),
        (200_000, "2d 07:33"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_step_in_one_line() -> None:
    metrics = make_history(num_steps=2)[-1]
    assert describe_step(metrics) == "loss 4.0000  grad 1.50  lr 1.00e-03  1.0k tok/s  ETA 0:42"


def test_a_step_names_what_is_unusual() -> None:
    metrics = make_history(peak_tflops=PEAK_TFLOPS, num_steps=2, grad_norm=None, is_skipped=True)[-1]
    assert describe_step(metrics) == "loss 4.0000  lr 1.00e-03  1.0k tok/s  MFU 0.6%  SKIPPED  ETA 0:42"


def test_summary_rows() -> None:
    rows = summarize(make_history(PEAK_TFLOPS), [VALIDATION | {"step": 2}, VALIDATION], make_facts(PEAK_TFLOPS))
    assert rows == {
        "steps": "1 to 5 of 9",
        "tokens": "10,240",
        "loss": "8.0000 -> 1.6000",
        "time per step": "4.000 s (median)",  # of 2, 3, 4 and 5 s: the first step is left out
        "tokens/s": "512 in all, 128 per rank (median)",
        "model TFLOP/s": "0.001 per rank, FLOP convention A",
        "MFU": "0.3% of 0.25 TFLOP/s dense, FLOP convention A",
        "peak memory": "5.00 GiB on the heaviest rank",
        "device": "4 x toy GPU",
        "code at step 4": "loss 1.5000, perplexity 4.48",
    }


def test_summary_says_why_there_is_no_mfu_and_counts_skipped_steps() -> None:
    rows = summarize(make_history(num_steps=1, is_skipped=True), [], make_facts())
    assert rows["MFU"] == "no dense peak is known for this device"
    assert rows["time per step"] == "10.000 s (median)"
    assert rows["skipped steps"] == "1"


def test_plain_output_is_a_line_now_and_then(monkeypatch) -> None:
    clock = {"now_s": 100.0}
    monkeypatch.setattr(reporter_module.time, "perf_counter", lambda: clock["now_s"])
    stream = io.StringIO()
    reporter = Reporter(stream, make_facts())
    reporter.start(1)
    for metrics in make_history(num_steps=9):
        reporter.show_step(metrics)
        clock["now_s"] += 2.0
    reporter.stop()
    # The first, then each that comes 5 s or more after the one before, and the last.
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["1/9", "4/9", "7/9", "9/9"]
    assert "\x1b" not in stream.getvalue()


def test_messages_are_not_read_as_markup() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, make_facts())
    reporter.say("saved to [bold]/x[/bold]")
    reporter.show_validation(VALIDATION)
    assert stream.getvalue() == "saved to [bold]/x[/bold]\nstep 4  code loss 1.5000  perplexity 4.48\n"


def test_a_terminal_gets_a_live_bar() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, make_facts())
    reporter.console = Console(file=stream, force_terminal=True, width=140)
    reporter.start(3)
    for metrics in make_history(num_steps=5)[2:]:
        reporter.show_step(metrics)
    reporter.stop()
    assert "5/9" in stream.getvalue()
    assert "loss 1.6000" in stream.getvalue()
    reporter.say("after the bar")
    assert stream.getvalue().endswith("after the bar\n")


def test_the_table_names_what_lies_on_disk(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, make_facts())
    reporter.show_summary([], [], {"metrics": tmp_path})
    assert stream.getvalue() == ""
    reporter.show_summary(make_history(), [VALIDATION], {"metrics": Path("out/m.jsonl"), "loss curve": None})
    assert "out/m.jsonl" in stream.getvalue()
    assert "loss curve" not in stream.getvalue()
    assert "8.0000 -> 1.6000" in stream.getvalue()


def test_the_loss_curve_is_drawn_as_an_image(tmp_path: Path) -> None:
    from matplotlib import image

    path = tmp_path / "loss.png"
    steps = [{"step": step, "loss": 8.0 / step} for step in range(1, 120)]
    write_loss_curve(steps, [VALIDATION], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (540, 960)
    assert len({tuple(pixel) for row in pixels[::4, ::4, :3] for pixel in row}) > 20  # lines in several colours
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_scores_have_an_axis_of_their_own() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    score = {"task": "ceval-ppl", "metric": "acc", "num_fewshot": 5, "value": 0.25, "is_part": False}
    part = {**score, "task": "ceval-ppl_law", "is_part": True}
    lines = [
        {"step": 20, "scores": [{**score, "value": 0.3}, part]},
        {"step": 10, "scores": [score, part, {**score, "metric": "lost", "value": None}]},
        {"step": 30, "failure": "no data"},
    ]
    (drawn,) = draw_scores(axes, lines)
    assert drawn.get_label() == "ceval-ppl acc, 5-shot"
    assert [list(values) for values in drawn.get_data()] == [[10, 20], [0.25, 0.3]]
    assert drawn.axes is not axes
    assert draw_scores(axes, [lines[-1]]) == []
