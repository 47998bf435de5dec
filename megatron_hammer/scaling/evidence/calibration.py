"""Fit the coefficients of the performance model to measured runs.

The fit minimises the squares of log(predicted / measured step time). The loss grows only linearly for outliers, every
publication has about the same weight, and every coefficient is held close to its prior, so a coefficient that no run
contains information about keeps its value. `cross_validation.py` computes the errors on runs that a fit has not seen.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.scaling.cost.coefficients import (
    GPU_PRIORS,
    PRIORS,
    Coefficients,
    flatten_coefficients,
    load_coefficients,
    replace_values,
    select_generation,
)
from megatron_hammer.scaling.cost.expert_coefficients import EXPERT_PRIORS, EXPERT_TABLE
from megatron_hammer.scaling.cost.prior import Prior
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import MeasuredRun

RELATIVE_ERROR = 0.05  # expected of one run: software versions, clusters and rounding differ by about that much
# The residuals of a publication's n runs are weighted by n ^ (this - 0.5). With 0.5 every run would have weight 1, and
# with 0 every publication the same total weight, however many runs it has.
SOURCE_WEIGHT_EXPONENT = 0.35
MOST_RUNS_OF_A_SOURCE = 120  # more runs of one table add no information; evenly spaced ones are taken
STEP_OF_DIFFERENCE = 1e-3  # of a coefficient's logarithm, for the numerical derivative


class FreeCoefficient(NamedTuple):
    """A number of `flatten_coefficients` that is fitted, its prior, and the runs whose prediction it changes."""

    name: str
    prior: Prior
    runs: NDArray[np.intp]


def name_publication(source: str) -> str:
    """The publication that a source belongs to: its versions and tables share hardware and authors.

    These are the first two words of the name that are not versions or dates: "NVIDIA_dgxc-benchmarking_v25.02" ->
    "NVIDIA_dgxc-benchmarking". A fold of a cross-validation leaves out all of them together.
    """
    words = [word for word in source.split("_") if not re.fullmatch(r"v?\d.*", word)]
    return "_".join(words[:2]) or source


def fit(
    runs: Sequence[MeasuredRun], start: Coefficients | None = None, *, is_prior_start: bool = False
) -> Coefficients:
    """Coefficients that predict these runs best, from `start` (by default the shipped ones).

    is_prior_start: coefficients are held to the values of `start`, as for a user's few runs; otherwise to the priors of
    `coefficients.py`. Raises DataError if there are no runs.
    """
    if not runs:
        raise DataError("runs: must hold at least one run that can be predicted, got none. Add measured rows.")
    fitted = start or load_coefficients()
    # Two stages, so that the two kinds of models do not disturb each other's fit.
    for has_experts in (False, True):
        chosen = [run for run in runs if (run.plan.model.moe is not None) == has_experts]
        if chosen:
            fitted = _fit_stage(chosen, fitted, is_prior_start=is_prior_start)
    return fitted


def fit_fold(
    held_out: Sequence[MeasuredRun],
    others: Sequence[MeasuredRun],
    start: Coefficients,
    dense_fits: dict[tuple[int, ...], Coefficients],
    *,
    is_prior_start: bool = False,
) -> Coefficients:
    """`fit` to the other runs, as far as the predictions of these depend on it: dense ones on no run with experts.

    dense_fits: fits to dense runs that earlier folds with the same runs made; this one is added.
    """
    dense = [run for run in others if run.plan.model.moe is None]
    key = tuple(map(id, dense))
    if key not in dense_fits:
        dense_fits[key] = fit(dense, start, is_prior_start=is_prior_start) if dense else start
    experts = [run for run in others if run.plan.model.moe is not None]
    if not experts or all(run.plan.model.moe is None for run in held_out):
        return dense_fits[key]
    return fit(experts, dense_fits[key], is_prior_start=is_prior_start)


def _fit_stage(runs: Sequence[MeasuredRun], start: Coefficients, *, is_prior_start: bool) -> Coefficients:
    """The fit to runs that are all dense, or all with experts: these change the coefficients of experts only."""
    free = select_free_coefficients(runs, start, is_prior_start=is_prior_start)
    values = flatten_coefficients(start)
    weights = weigh_runs(runs)
    measured = np.log([run.step_time_s for run in runs])
    names = [one.name for one in free]
    # Everything is fitted in logarithms: coefficients stay positive, and twice and half are equally far from a prior.
    centre = np.log([one.prior.value for one in free])
    spread = np.array([one.prior.spread for one in free])
    low, high = np.log([one.prior.low for one in free]), np.log([one.prior.high for one in free])

    def build(logarithms: NDArray[np.float64]) -> Coefficients:
        return replace_values(start, dict(zip(names, np.exp(logarithms).tolist(), strict=True)))

    def predict(logarithms: NDArray[np.float64], rows: NDArray[np.intp]) -> NDArray[np.float64]:
        coefficients = build(logarithms)
        return np.log([predict_step(runs[row].plan, coefficients).total_s for row in rows])

    def find_residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        errors = (predict(logarithms, np.arange(len(runs))) - measured) / RELATIVE_ERROR
        return np.concatenate([weights * _soften(errors), (logarithms - centre) / spread])

    def find_jacobian(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = predict(logarithms, np.arange(len(runs)))
        slope = weights * _soften_slope((predicted - measured) / RELATIVE_ERROR) / RELATIVE_ERROR
        jacobian = np.zeros((len(runs) + len(free), len(free)))
        for column, one in enumerate(free):
            # One-sided difference, away from the upper bound. Only the runs that the coefficient changes are predicted.
            moved = logarithms.copy()
            step = STEP_OF_DIFFERENCE if logarithms[column] + STEP_OF_DIFFERENCE < high[column] else -STEP_OF_DIFFERENCE
            moved[column] += step
            difference = predict(moved, one.runs) - predicted[one.runs]
            jacobian[one.runs, column] = slope[one.runs] * difference / step
            jacobian[len(runs) + column, column] = 1.0 / spread[column]
        return jacobian

    # least_squares needs a start strictly inside the bounds.
    first = np.clip(np.log([values[name] for name in names]), low + 1e-6, high - 1e-6)
    return build(_minimise(find_residuals, find_jacobian, first, low, high))


def select_free_coefficients(
    runs: Sequence[MeasuredRun], start: Coefficients, *, is_prior_start: bool = False
) -> list[FreeCoefficient]:
    """The coefficients that change the prediction of at least one run, with their priors.

    Of runs with experts only the coefficients of experts: the others are fitted to dense models.
    """
    has_experts = any(run.plan.model.moe is not None for run in runs)
    values = flatten_coefficients(start)
    base = np.array([predict_step(run.plan, start).total_s for run in runs])
    free = []
    for name, value in values.items():
        gpu, dot, own = name.rpartition(".")
        if has_experts != (gpu == EXPERT_TABLE):
            continue
        is_shared = not dot or has_experts
        rows = [row for row, run in enumerate(runs) if is_shared or _is_of_gpu(run.plan, gpu, start)]
        if not rows:
            continue
        # A GPU with its own coefficients has the priors of its generation.
        if has_experts:
            prior = EXPERT_PRIORS[own]
        elif dot:
            prior = GPU_PRIORS[gpu if gpu in GPU_PRIORS else select_generation(runs[rows[0]].plan.gpu)][own]
        else:
            prior = PRIORS[name]
        if is_prior_start:
            # A measured start may lie outside the bounds. They are widened, because clipping would change the start.
            prior = prior._replace(value=value, low=min(prior.low, value), high=max(prior.high, value))
        # A change of 2 % is far above rounding, and small enough to stay near the start.
        moved = replace_values(start, {name: value * 1.02})
        informed = [row for row in rows if abs(predict_step(runs[row].plan, moved).total_s / base[row] - 1) > 1e-6]
        if informed:
            free.append(FreeCoefficient(name, prior, np.array(informed, dtype=np.intp)))
    if not free:
        raise ConfigError("runs: must inform at least one coefficient, got none that does. Add other rows.")
    return free


def select_fit_runs(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """The runs that a fit takes: all, or MOST_RUNS_OF_A_SOURCE evenly spaced ones of a source that has more."""
    by_source: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        by_source.setdefault(run.source, []).append(run)
    chosen = []
    for group in by_source.values():
        step = max(1.0, len(group) / MOST_RUNS_OF_A_SOURCE)
        chosen += [group[int(index * step)] for index in range(min(len(group), MOST_RUNS_OF_A_SOURCE))]
    return chosen


def weigh_runs(runs: Sequence[MeasuredRun]) -> NDArray[np.float64]:
    """Weights of the runs' residuals: the more runs a publication has, the smaller is the weight of each."""
    publications = [name_publication(run.source) for run in runs]
    sizes = Counter(publications)
    return np.array([sizes[name] ** (SOURCE_WEIGHT_EXPONENT - 0.5) for name in publications])


def _is_of_gpu(plan: Plan, gpu: str, coefficients: Coefficients) -> bool:
    """Whether a plan is predicted with the coefficients of this table."""
    if plan.gpu.name in coefficients.gpus:
        return plan.gpu.name == gpu
    return select_generation(plan.gpu) == gpu


def _soften(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Residuals whose squares grow only linearly beyond one: Charbonnier's loss 2 * (sqrt(1 + z^2) - 1)."""
    return np.sign(errors) * np.sqrt(2.0 * (np.sqrt(1.0 + errors**2) - 1.0))


def _soften_slope(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of `_soften`; 1 at zero."""
    softened = np.abs(_soften(errors))
    return np.where(softened > 1e-6, np.abs(errors) / np.sqrt(1.0 + errors**2) / np.maximum(softened, 1e-9), 1.0)


def _minimise(
    find_residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    find_jacobian: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    first: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float64]:
    from scipy.optimize import least_squares  # here, because only calibrate and --cross-validate need scipy

    result = least_squares(
        find_residuals, first, jac=find_jacobian, bounds=(low, high), ftol=1e-4, xtol=1e-4, max_nfev=25
    )
    return result.x
