"""Fit the coefficients of the performance model to measured runs.

Least squares on the logarithm of predicted over measured step time, with a loss that grows linearly for outliers, every
publication weighed about equally, and every coefficient held to its prior: what no run informs stays where it was.
`cross_validation.py` says what a fit is worth on runs that it has not seen.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.scaling.cost.coefficients import (
    GPU_PRIORS,
    PRIORS,
    Coefficients,
    Prior,
    flatten_coefficients,
    load_coefficients,
    replace_values,
    select_generation,
)
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.plan import Plan

RELATIVE_ERROR = 0.05  # of one run: software versions, clusters and rounding differ by that much
SOURCE_WEIGHT_EXPONENT = 0.35  # n runs of one publication count as n to this power, once squared: 0.5 would be equal
MOST_RUNS_OF_A_SOURCE = 120  # more of one table say nothing new: they are thinned out evenly
STEP_OF_DIFFERENCE = 1e-3  # of a coefficient's logarithm


class FittableRun(Protocol):
    """What a fit needs of a measured run; `published_runs.MeasuredRun` and `measured_runs` have it."""

    @property
    def source(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def step_time_s(self) -> float: ...


class FreeCoefficient(NamedTuple):
    """A number of `flatten_coefficients` that is fitted, with the prior it is held to and the runs it can change."""

    name: str
    prior: Prior
    runs: NDArray[np.intp]


def name_publication(source: str) -> str:
    """The publication that a source belongs to: versions and tables of one share hardware and authors.

    The first two words of the name that are not versions or dates, so that no fold of a cross-validation sees another
    table of what it leaves out: "NVIDIA_dgxc-benchmarking_v25.02" -> "NVIDIA_dgxc-benchmarking".
    """
    words = [word for word in source.split("_") if not re.fullmatch(r"v?\d.*", word)]
    return "_".join(words[:2]) or source


def fit(
    runs: Sequence[FittableRun], start: Coefficients | None = None, *, is_prior_start: bool = False
) -> Coefficients:
    """Coefficients that predict these runs best, from `start` (by default the shipped ones).

    is_prior_start: the start's values are the priors, as for a user's few runs; else the priors of `coefficients.py`.
    Raises DataError without runs.
    """
    if not runs:
        raise DataError("runs: must hold at least one run that can be predicted, got none. Add measured rows.")
    start = start or load_coefficients()
    free = select_free_coefficients(runs, start, is_prior_start=is_prior_start)
    values = flatten_coefficients(start)
    weights = weigh_runs(runs)
    measured = np.log([run.step_time_s for run in runs])
    names = [one.name for one in free]
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
            moved = logarithms.copy()
            step = STEP_OF_DIFFERENCE if logarithms[column] + STEP_OF_DIFFERENCE < high[column] else -STEP_OF_DIFFERENCE
            moved[column] += step
            difference = predict(moved, one.runs) - predicted[one.runs]
            jacobian[one.runs, column] = slope[one.runs] * difference / step
            jacobian[len(runs) + column, column] = 1.0 / spread[column]
        return jacobian

    first = np.clip(np.log([values[name] for name in names]), low + 1e-6, high - 1e-6)
    return build(_minimise(find_residuals, find_jacobian, first, low, high))


def select_free_coefficients(
    runs: Sequence[FittableRun], start: Coefficients, *, is_prior_start: bool = False
) -> list[FreeCoefficient]:
    """Those that change the prediction of at least one run, with their priors."""
    values = flatten_coefficients(start)
    base = np.array([predict_step(run.plan, start).total_s for run in runs])
    free = []
    for name, value in values.items():
        gpu, dot, own = name.rpartition(".")
        rows = [row for row, run in enumerate(runs) if not dot or _is_of_gpu(run.plan, gpu, start)]
        if not rows:
            continue
        table = gpu if gpu in GPU_PRIORS else select_generation(runs[rows[0]].plan.gpu)  # a GPU's own: its generation's
        prior = GPU_PRIORS[table][own] if dot else PRIORS[name]
        if is_prior_start:
            prior = prior._replace(value=value, low=min(prior.low, value), high=max(prior.high, value))
        moved = replace_values(start, {name: value * 1.02})
        informed = [row for row in rows if abs(predict_step(runs[row].plan, moved).total_s / base[row] - 1) > 1e-6]
        if informed:
            free.append(FreeCoefficient(name, prior, np.array(informed, dtype=np.intp)))
    if not free:
        raise ConfigError("runs: must inform at least one coefficient, got none that does. Add other rows.")
    return free


def select_fit_runs[R: FittableRun](runs: Sequence[R]) -> list[R]:
    """The runs that a fit takes: of a source with very many, MOST_RUNS_OF_A_SOURCE of them evenly spaced."""
    by_source: dict[str, list[R]] = {}
    for run in runs:
        by_source.setdefault(run.source, []).append(run)
    chosen = []
    for group in by_source.values():
        step = max(1.0, len(group) / MOST_RUNS_OF_A_SOURCE)
        chosen += [group[int(index * step)] for index in range(min(len(group), MOST_RUNS_OF_A_SOURCE))]
    return chosen


def weigh_runs(runs: Sequence[FittableRun]) -> NDArray[np.float64]:
    """Weights of the runs' residuals: the more runs a publication has, the less each counts."""
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
    from scipy.optimize import least_squares

    result = least_squares(
        find_residuals, first, jac=find_jacobian, bounds=(low, high), ftol=1e-4, xtol=1e-4, max_nfev=25
    )
    return result.x
