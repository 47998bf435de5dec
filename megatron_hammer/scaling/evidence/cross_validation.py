"""The errors of the performance model on runs that it was not fitted to: every publication is left out once.

A fold leaves out all tables of one publication, because versions of one table share hardware, software and layouts, and
the same recipes elsewhere (`folds.py`). These are the errors to quote, and the width of the band is computed from them.
"""

import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import (
    EXPERT_BAND,
    name_band,
    predict_step,
    select_band_class,
    select_band_scale,
    split_band,
)
from megatron_hammer.scaling.evidence.calibration import fit, fit_fold, name_publication
from megatron_hammer.scaling.evidence.folds import FoldBy, list_folds
from megatron_hammer.scaling.evidence.layout_ranking import (
    RankingSummary,
    estimate_layout_correlation,
    rank_layouts,
    summarise_rankings,
)
from megatron_hammer.scaling.plan import Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun

BAND_COVERAGE = 0.8
LEAST_RUNS_OF_A_CLASS = 12  # a class with fewer errors takes the band of all runs
PredictedRun = tuple[MeasuredRun, StepTime]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorSummary:
    """Errors of predicted over measured step time, as ratios: 0.05 is 5%. The bias is the median with its sign."""

    num_runs: int
    median_ratio: float
    mean_ratio: float
    bias_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """The result of a cross-validation: errors of all runs and by publication, the ranking, and the bands."""

    errors: ErrorSummary
    by_publication: Mapping[str, ErrorSummary]
    ranking: RankingSummary | None
    bands: Mapping[str, float]
    num_runs_by_class: Mapping[str, int]
    layout_correlation: float

    def build_table(self) -> dict[str, Any]:
        """For JSON and for the provenance of a coefficients file."""
        return {
            "all": asdict(self.errors),
            "by_publication": {name: asdict(errors) for name, errors in self.by_publication.items()},
            "ranking": asdict(self.ranking) if self.ranking else None,
        }


def assess(predictions: Sequence[PredictedRun]) -> Assessment:
    runs = [run for run, _ in predictions]
    bands = estimate_bands(predictions)
    return Assessment(
        errors=summarise_errors(predictions),
        by_publication=summarise_by_publication(predictions),
        ranking=summarise_rankings(rank_layouts(runs, [step for _, step in predictions])),
        bands=bands,
        num_runs_by_class=Counter(select_band_class(run.plan) for run in runs),
        layout_correlation=estimate_layout_correlation(
            runs,
            [find_error(prediction) for prediction in predictions],
            [bands[select_band_class(run.plan)] for run in runs],
            start=load_coefficients().layout_correlation,
        ),
    )


def cross_validate(
    runs: Sequence[MeasuredRun],
    start: Coefficients | None = None,
    *,
    is_prior_start: bool = False,
    by: FoldBy = "recipe",
) -> list[PredictedRun]:
    """Each run with the prediction of coefficients that were fitted without its fold, in the runs' order.

    A fold without any other run, such as a single run, is predicted by the start. start, is_prior_start: as in
    `calibration.fit`. by: as in `folds.list_folds`.
    """
    start = start or load_coefficients()
    predictions: dict[int, StepTime] = {}
    dense_fits: dict[tuple[int, ...], Coefficients] = {}
    for held_out, fitted in list_folds(runs, by=by):
        coefficients = fit_fold(
            [runs[row] for row in held_out],
            [runs[row] for row in fitted],
            start,
            dense_fits,
            is_prior_start=is_prior_start,
        )
        predictions |= {row: predict_step(runs[row].plan, coefficients) for row in held_out}
    return [(run, predictions[row]) for row, run in enumerate(runs)]


def _name_bands(plan: Plan) -> tuple[str, str]:
    band_class = select_band_class(plan)
    return band_class, name_band(band_class, select_band_scale(plan))


def find_error(prediction: PredictedRun) -> float:
    """The logarithm of predicted over measured."""
    run, step = prediction
    return math.log(step.total_s / run.step_time_s)


def summarise_errors(predictions: Iterable[PredictedRun]) -> ErrorSummary:
    ratios = np.array([math.exp(find_error(prediction)) - 1.0 for prediction in predictions])
    return ErrorSummary(
        num_runs=len(ratios),
        median_ratio=float(np.median(np.abs(ratios))),
        mean_ratio=float(np.mean(np.abs(ratios))),
        bias_ratio=float(np.median(ratios)),
    )


def summarise_by_publication(predictions: Iterable[PredictedRun]) -> dict[str, ErrorSummary]:
    groups: dict[str, list[PredictedRun]] = defaultdict(list)
    for prediction in predictions:
        groups[name_publication(prediction[0].source)].append(prediction)
    return {name: summarise_errors(group) for name, group in sorted(groups.items())}


def estimate_bands(predictions: Sequence[PredictedRun]) -> dict[str, float]:
    """By class, and by class and scale, the logarithmic half-width around a prediction that holds 80 % of these errors.

    A publication's weight is the square root of its number of runs, because the next run will be from a publication
    that is not among these. A class with few errors takes the band of all dense runs, or of all runs with experts. A
    scale at which a class has few errors takes the band of the class, times what the errors of all classes at this
    scale are over the bands of theirs.
    """
    kinds: dict[str, list[PredictedRun]] = defaultdict(list)
    classes: dict[str, list[PredictedRun]] = defaultdict(list)
    scales: dict[str, list[PredictedRun]] = defaultdict(list)
    for prediction in predictions:
        plan = prediction[0].plan
        classes[select_band_class(plan)].append(prediction)
        scales[select_band_scale(plan)].append(prediction)
        kinds["default" if plan.model.moe is None else EXPERT_BAND].append(prediction)
    bands = {name: _weighted_quantile(group) for name, group in kinds.items()}
    # Runs with experts are less certain than dense ones, so without dense runs their band is the one of any other.
    bands = {"default": bands.get("default", bands.get(EXPERT_BAND, 0.0))} | bands
    for name, group in sorted(classes.items()):
        own = bands["default" if group[0][0].plan.model.moe is None else EXPERT_BAND]
        bands[name] = _weighted_quantile(group) if len(group) >= LEAST_RUNS_OF_A_CLASS else own
    return bands | _estimate_scaled_bands(classes, scales, bands)


def _estimate_scaled_bands(
    classes: Mapping[str, Sequence[PredictedRun]],
    scales: Mapping[str, Sequence[PredictedRun]],
    bands: Mapping[str, float],
) -> dict[str, float]:
    """The bands of classes at scales. bands: of the classes alone."""
    factors = {
        scale: _weighted_quantile(group, [bands[select_band_class(run.plan)] for run, _ in group])
        for scale, group in scales.items()
        if len(group) >= LEAST_RUNS_OF_A_CLASS
    }
    by_scale = {}
    for name, group in sorted(classes.items()):
        for scale in sorted(scales):
            own_group = [one for one in group if select_band_scale(one[0].plan) == scale]
            if len(own_group) >= LEAST_RUNS_OF_A_CLASS:
                by_scale[name_band(name, scale)] = _weighted_quantile(own_group)
            elif scale in factors:
                by_scale[name_band(name, scale)] = bands[name] * factors[scale]
    return by_scale


def _weighted_quantile(predictions: Sequence[PredictedRun], units: Sequence[float] | None = None) -> float:
    """The BAND_COVERAGE quantile of absolute errors; a publication weighs the square root of its number of runs.

    units: what each error is divided by.
    """
    errors = np.array([abs(find_error(prediction)) for prediction in predictions])
    if units is not None:
        errors = errors / np.array(units)
    publications = [name_publication(run.source) for run, _ in predictions]
    sizes = {name: publications.count(name) for name in set(publications)}
    weights = np.array([sizes[name] ** -0.5 for name in publications])
    order = np.argsort(errors)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(errors[order][min(int(np.searchsorted(reached, BAND_COVERAGE)), len(errors) - 1)])


def calibrate(
    runs: Sequence[MeasuredRun], start: Coefficients, assessment: Assessment, *, is_prior_start: bool = False
) -> Coefficients:
    """Coefficients fitted to all runs, with the bands and the provenance of a file that can be shipped.

    Fitted from the priors (not is_prior_start), they depend on these runs only. Otherwise they also depend on the runs
    of the start, whose bands are kept for classes that have few runs here.
    """
    fitted = fit(runs, start, is_prior_start=is_prior_start)
    own = {name: ratio for name, ratio in assessment.bands.items() if name != "default"}
    if is_prior_start:
        # The start's band stays for a class, unless there are enough new runs of it.
        known = {name for name, number in assessment.num_runs_by_class.items() if number >= LEAST_RUNS_OF_A_CLASS}
        # The start's bands of a class at one scale do not outlive its band.
        kept = {name: ratio for name, ratio in start.band_ratio.items() if split_band(name) not in known}
        bands = {**kept, **{name: ratio for name, ratio in own.items() if name in known}}
        earlier = start.provenance
    else:
        bands, earlier = dict(assessment.bands), {}
    fingerprints = dict.fromkeys([*earlier.get("fingerprints", []), *(run.fingerprint for run in runs)])
    provenance = {
        "date": datetime.date.today().isoformat(),
        "method": "least squares on log(predicted / measured), megatron_hammer/scaling/evidence/calibration.py",
        "num_runs": len(fingerprints),
        "num_runs_with_experts": sum(run.plan.model.moe is not None for run in runs),
        "cross_validated_median_ratio": assessment.errors.median_ratio,
        "cross_validated_mean_ratio": assessment.errors.mean_ratio,
        "fingerprints": list(fingerprints),
        "sources": {**earlier.get("sources", {}), **Counter(run.source for run in runs)},
        "cross_validated_by_publication": {
            name: f"{errors.num_runs} runs, median {errors.median_ratio:.1%}, mean {errors.mean_ratio:.1%}, "
            f"bias {errors.bias_ratio:+.1%}"
            for name, errors in assessment.by_publication.items()
        },
    }
    return replace(fitted, band_ratio=bands, layout_correlation=assessment.layout_correlation, provenance=provenance)
