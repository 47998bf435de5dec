"""The errors of predictions on runs that the coefficients have not seen, and whether layouts are ranked correctly.

Runs that the coefficients were fitted on are flagged and excluded from every error figure. Cross-validation predicts
each run with coefficients that were fitted without its publication and its recipe (`folds.py`). Refused rows are
counted beside the errors, so that a small error of few rows is seen as such. `validation_report.py` prints the result.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_hammer.scaling.cost.coefficients import Coefficients, build_prior_coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.calibration import fit_fold, name_publication, select_fit_runs
from megatron_hammer.scaling.evidence.folds import Fold, FoldBy, list_folds
from megatron_hammer.scaling.evidence.layout_ranking import Ranking, rank_layouts
from megatron_hammer.scaling.plan import StepTime
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, UnpredictableRow

Status = Literal["predicted", "fitted", "cross-validated"]

SCALES = ((8, "1-8 GPUs"), (64, "9-64 GPUs"), (512, "65-512 GPUs"))  # the largest of each, then the rest
LARGEST_SCALE = "over 512 GPUs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One measured run and its prediction."""

    run: MeasuredRun
    step: StepTime
    status: Status

    @property
    def is_counted(self) -> bool:
        """Whether an accuracy may be quoted on it."""
        return self.status != "fitted"

    @property
    def error_ratio(self) -> float:
        """Predicted over measured step time, minus one. Above zero, the prediction is slower than the measurement."""
        return float(self.step.total_s / self.run.step_time_s - 1)

    @property
    def is_in_band(self) -> bool:
        return bool(self.step.low_s <= self.run.step_time_s <= self.step.high_s)

    @property
    def memory_bytes(self) -> int:
        """What the row's own plan needs of its GPU."""
        return estimate_heaviest_plan_stage(self.run.plan).total_bytes

    @property
    def is_out_of_memory(self) -> bool:
        """Whether a search would have refused the plan, although it was run."""
        return self.memory_bytes > self.run.plan.gpu.memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorFigures:
    """Errors of the step time of a group of runs, relative to the measured time."""

    num_rows: int
    median_absolute_ratio: float
    mean_absolute_ratio: float
    bias_ratio: float  # the median of the signed errors
    band_coverage_ratio: float  # share of the rows whose measured time lies in the predicted band


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """Every row of a table, predicted or with the reason why not; errors and rankings."""

    predictions: tuple[Prediction, ...]  # in the table's order
    unpredictable: tuple[UnpredictableRow, ...]
    errors: Mapping[str, Mapping[str, ErrorFigures]]  # by dimension ("source", "GPU", ...), then by its value
    rankings: tuple[Ranking, ...]
    refused: Mapping[str, Mapping[str, int]]  # number of unpredictable rows: of "all", by "software" and by "source"

    @property
    def out_of_memory(self) -> Mapping[str, int]:
        """By source, the number of rows whose own plan would be out of memory."""
        return Counter(one.run.source or "unnamed" for one in self.predictions if one.is_out_of_memory)

    @property
    def counted(self) -> tuple[Prediction, ...]:
        return tuple(one for one in self.predictions if one.is_counted)

    @property
    def num_fitted(self) -> int:
        return len(self.predictions) - len(self.counted)


def validate_runs(
    runs: Sequence[MeasuredRun], unpredictable: Sequence[UnpredictableRow], coefficients: Coefficients
) -> ValidationReport:
    """Predict every run. Runs whose fingerprint is in the coefficients file are "fitted"."""
    fitted = list_fitted_fingerprints(coefficients)
    predictions = [
        Prediction(
            run=run,
            step=predict_step(run.plan, coefficients),
            status="fitted" if run.fingerprint in fitted else "predicted",
        )
        for run in runs
    ]
    return build_validation_report(predictions, unpredictable)


def cross_validate_runs(
    runs: Sequence[MeasuredRun],
    unpredictable: Sequence[UnpredictableRow],
    announce: Callable[[str], None] = print,
    *,
    shipped: Coefficients | None = None,
    by: FoldBy = "recipe",
) -> ValidationReport:
    """Predict every run with coefficients fitted, from the priors, to the Megatron-style runs of all other folds.

    Runs of other software are in no fit: one fit to all Megatron-style runs predicts them. A table of models with
    experts only has none that coefficients of dense models are fitted to, and takes the shipped ones. announce: called
    before each fit, which takes seconds. shipped: where the bands come from, by default the shipped coefficients. by:
    as in `folds.list_folds`.
    """
    shipped = shipped or load_coefficients()
    megatron = [run for run in runs if run.is_megatron_style]
    start = replace(build_prior_coefficients(), band_ratio=shipped.band_ratio)
    if megatron and all(run.plan.model.moe is not None for run in megatron):
        start = replace(shipped, experts=start.experts)
    dense_fits: dict[tuple[int, ...], Coefficients] = {}
    others = [run for run in runs if not run.is_megatron_style]
    pool = [*megatron, *others]
    folds = list_folds(megatron, by=by)
    if others:
        folds.append(Fold(list(range(len(megatron), len(pool))), list(range(len(megatron)))))
    steps: dict[int, StepTime] = {}
    for held_out, fitted in folds:
        fit_runs = select_fit_runs([pool[row] for row in fitted])
        names = sorted({name_publication(pool[row].source) for row in held_out if pool[row].is_megatron_style})
        announce(f"fitting to {len(fit_runs)} runs" + (f", {', '.join(names)} left out" if names else ""))
        coefficients = fit_fold([pool[row] for row in held_out], fit_runs, start, dense_fits)
        steps |= {id(pool[row]): predict_step(pool[row].plan, coefficients) for row in held_out}
    predictions = [Prediction(run=run, step=steps[id(run)], status="cross-validated") for run in runs]
    return build_validation_report(predictions, unpredictable)


def build_validation_report(
    predictions: Sequence[Prediction], unpredictable: Sequence[UnpredictableRow]
) -> ValidationReport:
    """The errors and rankings of the predictions that may be counted."""
    counted = [one for one in predictions if one.is_counted]
    errors: dict[str, dict[str, ErrorFigures]] = {}
    for dimension, name_of in DIMENSIONS.items():
        groups: dict[str, list[Prediction]] = {}
        for one in counted:
            groups.setdefault(name_of(one.run), []).append(one)
        errors[dimension] = {
            name: compute_error_figures(group) for name, group in sorted(groups.items(), key=_by_scale)
        }
    return ValidationReport(
        predictions=tuple(predictions),
        unpredictable=tuple(unpredictable),
        errors=errors,
        refused={dimension: Counter(map(name_of, unpredictable)) for dimension, name_of in REFUSAL_DIMENSIONS.items()},
        rankings=tuple(rank_layouts([one.run for one in counted], [one.step for one in counted])),
    )


def list_fitted_fingerprints(coefficients: Coefficients) -> frozenset[str]:
    """The fingerprints of the runs that the coefficients were fitted on, from anywhere in their provenance."""
    return frozenset(_list_fingerprints(coefficients.provenance))


def _list_fingerprints(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if re.fullmatch(r"[0-9a-f]{16}", value):
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _list_fingerprints(key)
            yield from _list_fingerprints(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _list_fingerprints(item)


def compute_error_figures(predictions: Sequence[Prediction]) -> ErrorFigures:
    """The errors of a group of predictions, which must not be empty."""
    absolute = [abs(one.error_ratio) for one in predictions]
    return ErrorFigures(
        num_rows=len(predictions),
        median_absolute_ratio=statistics.median(absolute),
        mean_absolute_ratio=statistics.fmean(absolute),
        bias_ratio=statistics.median(one.error_ratio for one in predictions),
        band_coverage_ratio=statistics.fmean(one.is_in_band for one in predictions),
    )


def name_scale(run: MeasuredRun) -> str:
    num_gpus = run.plan.layout.world_size
    return next((name for largest, name in SCALES if num_gpus <= largest), LARGEST_SCALE)


def _name_style(run: MeasuredRun | UnpredictableRow) -> str:
    return "Megatron-style" if run.is_megatron_style else "other software"


DIMENSIONS: dict[str, Callable[[MeasuredRun], str]] = {
    "all": lambda run: "all rows",
    "software": _name_style,
    "source": lambda run: run.source or "unnamed",
    "GPU": lambda run: run.plan.gpu.name,
    "precision": lambda run: run.plan.precision,
    "scale": name_scale,
}
# What is known of a row that was refused, whatever the reason.
REFUSAL_DIMENSIONS: dict[str, Callable[[UnpredictableRow], str]] = {
    "all": lambda row: "all rows",
    "software": _name_style,
    "source": lambda row: row.source or "unnamed",
}
_SCALE_ORDER = {name: position for position, name in enumerate([*(name for _, name in SCALES), LARGEST_SCALE])}


def _by_scale(item: tuple[str, list[Prediction]]) -> tuple[int, str]:
    # Sorted as text, "65-512 GPUs" would come before "9-64 GPUs". Names of other dimensions stay in alphabetical order.
    return _SCALE_ORDER.get(item[0], 0), item[0]
