"""What a person sees: a live line while training, a table and a loss curve at the end."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from megatron_hammer.files.publish import publish_file
from megatron_hammer.training.metrics import MFU_CONVENTION, RunFacts, StepMetrics

PLAIN_LINE_INTERVAL_S = 5.0  # where the output is a file or a pipe, one line at most this often


class Reporter:
    """Writes to `stream`: a progress bar if it is a terminal, else a line every few seconds."""

    def __init__(self, stream: IO[str], facts: RunFacts):
        self.console = Console(file=stream, soft_wrap=True, highlight=False)
        self.facts = facts
        self._printed_at_s = 0.0
        self._has_warned = False
        self._progress: Progress | None = None
        self._task: Any = None

    def start(self, first_step: int) -> None:
        """Open the progress bar where the stream is a terminal. first_step: of this process, counted from 1."""
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            redirect_stdout=False,  # sys.stdout is megatron's log here, and stays it
            redirect_stderr=False,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=self.facts.train_steps, completed=first_step - 1)

    def show_step(self, metrics: StepMetrics) -> None:
        """Move the bar, or print a line if the last one is PLAIN_LINE_INTERVAL_S old."""
        if not (math.isfinite(metrics.loss) or metrics.is_skipped or self._has_warned):
            self._has_warned = True
            self.say(
                f"step {metrics.step}: loss is not a number: {metrics.loss}. The weights may be lost from here on."
            )
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, description=describe_step(metrics))
            return
        now_s = time.perf_counter()
        # The first and the last step are always printed, also in a run shorter than the interval.
        is_edge = metrics.step == self.facts.train_steps or self._printed_at_s == 0.0
        if is_edge or now_s - self._printed_at_s >= PLAIN_LINE_INTERVAL_S:
            self._printed_at_s = now_s
            self.console.print(f"step {metrics.step}/{self.facts.train_steps}  {describe_step(metrics)}")

    def show_validation(self, validation: dict[str, Any]) -> None:
        self.say(
            f"step {validation['step']}  {validation['validation_set']} loss {validation['loss']:.4f}  "
            f"perplexity {validation['perplexity']:.2f}"
        )

    def say(self, message: str) -> None:
        # Without markup: a path with brackets would be read as a style.
        self.console.print(message, markup=False)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show_summary(
        self, history: list[StepMetrics], validations: list[dict[str, Any]], paths: dict[str, Path | None]
    ) -> None:
        """A table of the run; `paths` names what it left on disk."""
        if not history:
            return
        table = Table(title="run", show_header=False)
        for name, value in summarize(history, validations, self.facts).items():
            table.add_row(name, value)
        for name, path in paths.items():
            if path is not None:
                table.add_row(name, str(path))
        self.console.print(table)


def describe_step(metrics: StepMetrics) -> str:
    """loss 7.1234  grad 1.02  lr 1.00e-03  12.3k tok/s  ETA 1:23"""
    parts = [f"loss {metrics.loss:.4f}"]
    if metrics.grad_norm is not None:
        parts.append(f"grad {metrics.grad_norm:.2f}")
    parts += [f"lr {metrics.lr:.2e}", f"{format_count(metrics.tokens_per_s)} tok/s"]
    if metrics.mfu is not None:
        parts.append(f"MFU {metrics.mfu:.1%}")
    if metrics.is_skipped:
        parts.append("SKIPPED")
    parts.append(f"ETA {format_duration(metrics.eta_s)}")
    return "  ".join(parts)


def summarize(history: list[StepMetrics], validations: list[dict[str, Any]], facts: RunFacts) -> dict[str, str]:
    """The rows of the closing table. Rates are medians over the steps after the first, which warms up."""
    first, last = history[0], history[-1]
    steady = sorted(history[1:] or history, key=lambda metrics: metrics.step_time_s)
    median = steady[len(steady) // 2]
    rows = {
        "steps": f"{first.step} to {last.step} of {facts.train_steps}",
        "tokens": f"{last.num_tokens:,}",
        "loss": f"{first.loss:.4f} -> {last.loss:.4f}",
        "time per step": f"{median.step_time_s:.3f} s (median)",
        "tokens/s": f"{median.tokens_per_s:,.0f} in all, {median.tokens_per_s_per_gpu:,.0f} per rank (median)",
        "model TFLOP/s": f"{median.model_tflops_per_gpu:.3f} per rank, FLOP convention {MFU_CONVENTION}",
        "MFU": "no dense peak is known for this device"
        if median.mfu is None
        else f"{median.mfu:.1%} of {facts.peak_tflops:g} TFLOP/s dense, FLOP convention {MFU_CONVENTION}",
        "peak memory": f"{max(metrics.peak_memory_bytes for metrics in history) / 2**30:.2f} GiB on the heaviest rank",
        "device": f"{facts.world_size} x {facts.device_name}",
    }
    num_skipped = sum(metrics.is_skipped for metrics in history)
    if num_skipped:
        rows["skipped steps"] = str(num_skipped)
    # A dict by name keeps the last line of each set.
    for validation in {line["validation_set"]: line for line in validations}.values():
        rows[f"{validation['validation_set']} at step {validation['step']}"] = (
            f"loss {validation['loss']:.4f}, perplexity {validation['perplexity']:.2f}"
        )
    return rows


def write_loss_curve(
    steps: list[dict[str, Any]], validations: list[dict[str, Any]], path: Path, scores: Sequence[dict[str, Any]] = ()
) -> None:
    """Loss over steps as a PNG: training, its running mean, and each validation set; scores on an axis of their own.

    scores: lines of scores.jsonl; averages are drawn in the place of the tasks that they cover.
    """
    import matplotlib

    # Agg draws into memory and needs no display, which a compute node does not have.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(x, y, linewidth=0.8, alpha=0.5, label="training")
    # 2% of the steps: smooths the noise between batches and keeps the shape of the curve.
    window = max(1, len(y) // 50)
    if window > 1:
        means = [sum(y[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(y))]
        axes.plot(x, means, linewidth=1.6, label=f"training, mean of {window} steps")
    for name in dict.fromkeys(line["validation_set"] for line in validations):
        points = [line for line in validations if line["validation_set"] == name]
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], "o-", markersize=4, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    lines = axes.get_lines() + draw_scores(axes, scores)
    axes.legend(lines, [line.get_label() for line in lines])
    with publish_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def draw_scores(axes: Any, lines: Sequence[dict[str, Any]]) -> list[Any]:
    """Add an axis for scores on the right, if there are any; returns what is drawn there."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for score in line.get("scores", ()):
            if not score["is_part"] and score["value"] is not None:
                name = f"{score['task']} {score['metric']}, {score['num_fewshot']}-shot"
                points.setdefault(name, []).append((line["step"], score["value"]))
    if not points:
        return []
    right = axes.twinx()
    right.set(ylabel="score")
    # Beside the colours of the losses.
    return [
        right.plot(*zip(*of_score, strict=True), "s--", markersize=4, color=f"C{number % 7 + 3}", label=name)[0]
        for number, (name, of_score) in enumerate(points.items())
    ]


def format_count(value: float) -> str:
    """1234567 -> 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """3725 -> 1:02:05, 83 -> 1:23, 200000 -> 2d 07:33."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
