"""Several machines for one training: days, cost, energy and CO2 of each, which is best, and how sure that is.

The days of two machines are compared through the errors of both predictions. These are independent between generations
of GPUs. Within one, they are correlated as `evidence/layout_ranking.py` says of layouts, and less so the more the
machines differ. A difference that the errors may explain is called a tie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_hammer.scaling.cost.coefficients import Coefficients, select_generation
from megatron_hammer.scaling.evidence.layout_ranking import BAND_Z, measure_layout_distances
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.search.projection import Bill, Projection, SizeProjection, Study, estimate_bill
from megatron_hammer.scaling.search.standing import estimate_spread

NUM_DRAWS = 20_000  # of the errors: the standard error of a probability is below 0.4 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """What a training takes. None: not known for this machine."""

    days: float
    cost_usd: float | None
    energy_mwh: float
    co2_tonnes: float | None  # of the energy used; nothing for making the hardware


CRITERIA = tuple(field.name for field in fields(Amounts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One machine with one number of GPUs, and the layout to start from. amounts, bill: None if nothing fits."""

    study: Study
    size: SizeProjection
    bill: Bill | None
    amounts: Amounts | None

    @property
    def best(self) -> Projection | None:
        return self.size.best


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The option with the smallest amount of one criterion.

    ties: options whose difference to it the errors may explain. probabilities: of being the smallest, for each option
    that has this amount. unknown: options that fit but lack the amount.
    """

    criterion: str
    best: int
    ties: tuple[int, ...]
    probabilities: dict[int, float]
    unknown: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Options in the order in which they were asked for. front: see find_front; against is days' rival."""

    options: tuple[Option, ...]
    verdicts: tuple[Verdict, ...]
    rival: str  # of days on the front: cost_usd, or energy_mwh if prices are missing
    front: tuple[int, ...]
    spreads: NDArray[np.float64]  # [options, options]: standard deviation of the logarithm of a ratio of two times


def build_option(study: Study, size: SizeProjection, kgco2_per_kwh: float | None) -> Option:
    """The study's size as an option. kgco2_per_kwh: of the grid; the building's overhead is in the energy."""
    if size.best is None or study.train_tokens is None:
        return Option(study=study, size=size, bill=None, amounts=None)
    bill = estimate_bill(size.best, train_tokens=study.train_tokens, usd_per_gpu_hour=study.usd_per_gpu_hour)
    amounts = Amounts(
        days=bill.days,
        cost_usd=bill.cost_usd,
        energy_mwh=bill.energy_mwh,
        # MWh times kg per kWh is tonnes.
        co2_tonnes=None if kgco2_per_kwh is None else bill.energy_mwh * kgco2_per_kwh,
    )
    return Option(study=study, size=size, bill=bill, amounts=amounts)


def compare(options: Sequence[Option], coefficients: Coefficients) -> Comparison:
    """Verdicts for every criterion that some option has, and the front of days against cost."""
    spreads, draws = _estimate_errors(options, coefficients)
    verdicts = [_judge(name, options, spreads, draws) for name in CRITERIA]
    priced = [one for one in options if one.amounts is not None and one.amounts.cost_usd is not None]
    rival = "cost_usd" if priced else "energy_mwh"
    return Comparison(
        options=tuple(options),
        verdicts=tuple(verdict for verdict in verdicts if verdict is not None),
        rival=rival,
        front=find_front(options, rival),
        spreads=spreads,
    )


def find_front(options: Sequence[Option], rival: str) -> tuple[int, ...]:
    """Options with no other that is as good in days and in the rival and better in one, from the fastest."""
    points = [
        (one.amounts.days, getattr(one.amounts, rival), position)
        for position, one in enumerate(options)
        if one.amounts is not None and getattr(one.amounts, rival) is not None
    ]
    front: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return tuple(position for _, _, position in front)


def find_interval(comparison: Comparison, first: int, second: int, criterion: str) -> tuple[float, float, float]:
    """(ratio, low, high): the amount of `first` over that of `second`, with its 80% interval."""
    ratio = _find_amount(comparison.options[first], criterion) / _find_amount(comparison.options[second], criterion)
    factor = math.exp(BAND_Z * comparison.spreads[first, second])
    return ratio, ratio / factor, ratio * factor


def _find_amount(option: Option, criterion: str) -> float:
    """NaN if it is not known."""
    value = None if option.amounts is None else getattr(option.amounts, criterion)
    return math.nan if value is None else float(value)


def _judge(
    criterion: str, options: Sequence[Option], spreads: NDArray[np.float64], draws: NDArray[np.float64]
) -> Verdict | None:
    """None if no option has the amount. Prices and energy per second are taken as exact, so every error is of time."""
    amounts = np.array([_find_amount(option, criterion) for option in options])
    known = [int(position) for position in np.flatnonzero(np.isfinite(amounts))]
    if not known:
        return None
    best = min(known, key=lambda position: float(amounts[position]))
    # An option that is better with a probability of at least 10 % is a tie: the 80 % interval of the ratio reaches 1.
    # Ties of layouts (search/standing.py) need a third, because another layout costs nothing to try.
    ties = [
        one for one in known if one != best and amounts[one] <= amounts[best] * math.exp(BAND_Z * spreads[one, best])
    ]
    smallest = np.argmin(np.log(amounts[known]) + draws[:, known], axis=1)
    shares = np.bincount(smallest, minlength=len(known)) / len(draws)
    return Verdict(
        criterion=criterion,
        best=best,
        ties=tuple(sorted(ties, key=lambda position: float(amounts[position]))),
        probabilities={position: float(share) for position, share in zip(known, shares, strict=True)},
        unknown=tuple(
            position for position, one in enumerate(options) if one.amounts is not None and position not in known
        ),
    )


def _estimate_errors(
    options: Sequence[Option], coefficients: Coefficients
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard deviations of log ratios [options, options], and draws of the logarithm of each time's error.

    draws: [NUM_DRAWS, options]. Zero where nothing fits.
    """
    fitting = [position for position, one in enumerate(options) if one.best is not None]
    projections = [one.best for one in options if one.best is not None]
    deviations = np.array([estimate_spread(one.step) for one in projections])
    plans = [one.plan for one in projections]
    correlations = correlate_errors(plans, coefficients.layout_correlation) if plans else np.zeros((0, 0))
    covariances = correlations * deviations[:, None] * deviations[None, :]
    variances = np.diag(covariances)
    own = np.sqrt(np.maximum(0.0, variances[:, None] + variances[None, :] - 2 * covariances))
    spreads = np.zeros((len(options), len(options)))
    draws = np.zeros((NUM_DRAWS, len(options)))
    if fitting:
        spreads[np.ix_(fitting, fitting)] = own
        # The same question gets the same answer.
        draws[:, fitting] = np.random.default_rng(0).multivariate_normal(
            np.zeros(len(fitting)), covariances, size=NUM_DRAWS
        )
    return spreads, draws


def correlate_errors(plans: Sequence[Plan], layout_correlation: float) -> NDArray[np.float64]:
    """Correlations of the errors of the plans' times: [len(plans), len(plans)].

    Between generations 0. Within one, `layout_correlation` to the power of the distance of the two: that of their
    layouts, and one step for each doubling of the number of GPUs, for another GPU, cluster and precision.
    """
    distances = measure_layout_distances(plans)
    is_related = np.zeros_like(distances)
    for row, one in enumerate(plans):
        for column, other in enumerate(plans):
            is_related[row, column] = select_generation(one.gpu) == select_generation(other.gpu)
            distances[row, column] += abs(math.log2(one.layout.world_size / other.layout.world_size))
            distances[row, column] += one.gpu != other.gpu
            distances[row, column] += one.cluster != other.cluster
            distances[row, column] += one.precision != other.precision
    return is_related * layout_correlation**distances
