"""Runs of one model side by side: the loss of every step, and how far each run differs from the first one.

Reads metrics.jsonl files, imports no torch. `tools/compare_runs.py` prints the comparison;
`examples/parallel_tour_cpu.sh` compares parallel layouts with the single process by it.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.files.tables import build_table
from megatron_hammer.files.typed import replace_non_finite
from megatron_hammer.training.metrics import SAVED_FIELD

# Megatron sums the same numbers in another order under another layout. In fp32 the first step, on equal weights,
# differs only by that; later steps also by the weights that it led to.
FIRST_STEP_TOLERANCE = 1e-5
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run measured, by step."""

    name: str
    losses: dict[int, float]
    grad_norms: dict[int, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far one run differs from its reference. A ratio is |run - reference| / |reference|, inf for NaN."""

    name: str
    reference: str
    first_step_ratio: float
    max_loss_ratio: float
    max_loss_step: int
    max_grad_norm_ratio: float | None  # None where no step of both has one; reported, not judged
    is_within: bool


def parse_named_path(text: str) -> tuple[str, Path]:
    """`NAME=PATH` as its two parts; raises ConfigError for anything else."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigError(f"--runs: each must be NAME=PATH, got {text!r}. Use --runs single=a/metrics.jsonl ...")
    return name, Path(path)


def read_run(name: str, path: Path) -> Run:
    """One metrics.jsonl. Raises DataError naming the file and line that is missing, empty or malformed."""
    if not path.is_file():
        raise DataError(f"{path}: must be a metrics.jsonl, got no such file. Check --metrics-path of run {name}.")
    losses: dict[int, float] = {}
    grad_norms: dict[int, float | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf8", errors="replace").splitlines(), 1):
        try:
            metrics = json.loads(line)
            if SAVED_FIELD in metrics:
                continue
            step = int(metrics["step"])
            if step in losses:
                raise ValueError
            # Null for a loss that is not finite, which JSON cannot say.
            losses[step] = math.nan if metrics["loss"] is None else float(metrics["loss"])
            # Null for a step whose gradient norm was not computed.
            grad_norms[step] = None if metrics["grad_norm"] is None else float(metrics["grad_norm"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise DataError(
                f"{path}:{number}: must be one JSON object with a new step, loss and grad_norm, got {line[:60]!r}. "
                f"Run {name} again."
            ) from None
    if not losses:
        raise DataError(f"{path}: must hold at least one step, got none. Run {name} again.")
    return Run(name=name, losses=losses, grad_norms=grad_norms)


def compare_to_first(
    runs: Sequence[Run], *, tolerance: float = TOLERANCE, first_step_tolerance: float = FIRST_STEP_TOLERANCE
) -> list[Difference]:
    """Every run after the first against the first. Raises DataError unless all have the same steps."""
    reference, *others = runs
    for run in others:
        # A comparison of the common steps alone would hide a run that stopped early.
        if run.losses.keys() != reference.losses.keys():
            raise DataError(
                f"{run.name}: must have the steps of {reference.name}, got {_describe_steps(run)} instead of "
                f"{_describe_steps(reference)}. Run both for as many steps."
            )
    return [_compare(run, reference, tolerance, first_step_tolerance) for run in others]


def _describe_steps(run: Run) -> str:
    return f"{len(run.losses)} steps from {min(run.losses)} to {max(run.losses)}"


def _compare(run: Run, reference: Run, tolerance: float, first_step_tolerance: float) -> Difference:
    ratios = {step: difference_ratio(loss, reference.losses[step]) for step, loss in run.losses.items()}
    max_step = max(ratios, key=lambda step: ratios[step])
    grad_norm_ratios = [
        difference_ratio(value, expected)
        for step, value in run.grad_norms.items()
        if value is not None and (expected := reference.grad_norms[step]) is not None
    ]
    first_step_ratio = ratios[min(ratios)]
    return Difference(
        name=run.name,
        reference=reference.name,
        first_step_ratio=first_step_ratio,
        max_loss_ratio=ratios[max_step],
        max_loss_step=max_step,
        max_grad_norm_ratio=max(grad_norm_ratios, default=None),
        is_within=first_step_ratio <= first_step_tolerance and ratios[max_step] <= tolerance,
    )


def difference_ratio(value: float, expected: float) -> float:
    """|value - expected| / |expected|; 0 where both are equal or NaN, inf where one is NaN or only `expected` is 0."""
    # First, so that two zeros or two equal infinities are no difference.
    if value == expected or (math.isnan(value) and math.isnan(expected)):
        return 0.0
    difference = abs(value - expected)
    return difference / abs(expected) if math.isfinite(difference) and expected != 0 else math.inf


def build_loss_table(runs: Sequence[Run], differences: Iterable[Difference]) -> Table:
    """A column per run, a row per step; below, how far each run differs from the first."""
    rows = [(f"step {step}", *(f"{run.losses[step]:.5f}" for run in runs)) for step in sorted(runs[0].losses)]
    table = build_table(None, ("loss", *(run.name for run in runs)), rows)
    table.add_section()
    by_name = {difference.name: difference for difference in differences}
    measures = {"differs": "max_loss_ratio", "at step": "max_loss_step", "grad norm": "max_grad_norm_ratio"}
    for title, attribute in measures.items():
        cells = (_format(getattr(by_name[run.name], attribute)) for run in runs[1:])
        table.add_row(title, "", *cells)
    return table


def _format(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1e}"


def print_comparison(
    groups: Sequence[Sequence[Run]], differences: Sequence[Sequence[Difference]], console: Console
) -> None:
    """A table for every group of runs, its reference first, then one line that sums up."""
    for runs, of_group in zip(groups, differences, strict=True):
        console.print(build_loss_table(runs, of_group), "")
    console.print(summarize(list(itertools.chain(*differences))), soft_wrap=True)


def summarize(differences: Sequence[Difference]) -> str:
    """The last line: how many runs were compared, and which strays most."""
    if not differences:
        return "compared: 0 runs, since each stands alone"
    worst = max(differences, key=lambda difference: difference.max_loss_ratio)
    strays = [difference.name for difference in differences if not difference.is_within]
    count = f"{len(differences)} run{'s' if len(differences) > 1 else ''}"
    references = " and ".join(dict.fromkeys(difference.reference for difference in differences))
    verdict = "all within tolerance" if not strays else f"{len(strays)} beyond tolerance ({', '.join(strays)})"
    return (
        f"compared: {count} with {references}, {verdict}; the loss differs most in {worst.name} "
        f"at step {worst.max_loss_step}, by {worst.max_loss_ratio:.1e} of {worst.reference}'s"
    )


def as_objects(groups: Sequence[Sequence[Run]], differences: Sequence[Sequence[Difference]]) -> list[dict[str, Any]]:
    """For --json: one object a run, its losses by step, and its difference (null for a reference)."""
    by_name = {difference.name: difference for difference in itertools.chain(*differences)}
    return [_as_object(run, by_name.get(run.name)) for run in itertools.chain(*groups)]


def _as_object(run: Run, difference: Difference | None) -> dict[str, Any]:
    measures = None if difference is None else asdict(difference)
    if measures is not None:
        del measures["name"]
    losses = [replace_non_finite({"step": step, "loss": loss}) for step, loss in sorted(run.losses.items())]
    return {"name": run.name, "losses": losses, "difference": measures}
