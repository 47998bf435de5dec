"""From a target loss or a number of tokens to size, tokens, GPUs, days and cost, with the uncertainty of all of them.

The loss law gives the size and the tokens, the search gives the layout and the time of a step at each number of GPUs,
and goodput.py adds failures. The size is a decision, so it is fixed; what it needs to reach the loss is not known
exactly. Days are therefore drawn together: tokens of a bootstrap sample of the law, a step time from its band, the
failure rate of a cluster, and chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.decisions.goodput import (
    BAND,
    NUM_SAMPLES,
    Goodput,
    Operations,
    draw_days,
    estimate_goodput,
    find_percentiles,
)
from megatron_hammer.scaling.decisions.scaled_shape import scale_shape
from megatron_hammer.scaling.loss_law.law import Interval, LossFit
from megatron_hammer.scaling.loss_law.optimum import EXTRAPOLATION_WARNING_RATIO, TokenCost
from megatron_hammer.scaling.loss_law.runs import ParameterConvention, count_size
from megatron_hammer.scaling.loss_law.target import (
    count_tokens_for_loss,
    find_cheapest_run,
    find_size_for_tokens,
    law_parameters,
)
from megatron_hammer.scaling.report.projection_file import build_row
from megatron_hammer.scaling.search.projection import SizeProjection, Study
from megatron_hammer.scaling.search.search import Search


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked for. Exactly one of loss and num_tokens is set; keeps_model: the size is given, too."""

    loss: float | None = None
    num_tokens: int | None = None
    keeps_model: bool = False
    deadline_days: float | None = None
    budget_usd: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenRun:
    """The size and tokens of a plan. Intervals are of the law's bootstrap, at its confidence.

    token_samples: [r] tokens that this size needs in each bootstrap sample; inf where it never reaches the loss.
    """

    model: ModelShape
    num_parameters: int
    best_size_interval: Interval | None  # of the best size; None for a size that was given
    num_tokens: int
    num_tokens_interval: Interval
    loss: float
    loss_interval: Interval
    token_samples: np.ndarray
    notes: tuple[str, ...]

    @property
    def unreached_ratio(self) -> float:
        """Share of the samples in which this size never reaches the loss."""
        return float(np.mean(~np.isfinite(self.token_samples)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSize:
    """A number of GPUs. `good` is None where nothing fits or nothing progresses, and `problem` says why."""

    num_gpus: int
    good: Goodput | None = None
    days: float | None = None  # median
    days_interval: Interval | None = None
    cost_usd: float | None = None
    cost_usd_interval: Interval | None = None
    chance_ratio: float | None = None  # of meeting deadline and budget; None without either
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """The answer. chosen: the size that meets the limits in most cases at the least cost, or None with `missing`."""

    target: Target
    run: ChosenRun
    sizes: tuple[PlannedSize, ...]
    chosen: PlannedSize | None
    missing: tuple[str, ...]


def choose_run(
    fit: LossFit, cost: TokenCost, target: Target, base: ModelShape, convention: ParameterConvention
) -> ChosenRun:
    """Size and tokens for the target. Raises ConfigError for a loss that the law, or the given size, cannot reach."""
    parameters = law_parameters(fit)
    size, size_samples = _find_sizes(parameters, cost, target)
    if target.loss is not None and not np.isfinite(size):
        raise ConfigError(
            f"target-loss: must be above the floor E = {fit.law.E:.4g} of the fitted law, got {target.loss:g}. "
            "No size reaches it with any number of tokens: choose a higher loss."
        )
    model = base if target.keeps_model else scale_shape(base, size, convention)
    num_parameters = count_size(model, convention)
    if target.num_tokens is not None:
        tokens = np.full(len(parameters), float(target.num_tokens))
    else:
        assert target.loss is not None
        tokens = count_tokens_for_loss(parameters, num_parameters, target.loss)
    if not np.isfinite(tokens[0]):
        floor = fit.law.predict(num_parameters, math.inf)
        raise ConfigError(
            f"target-loss: must be above what {model.name} reaches with endless tokens, {floor:.4g}, got "
            f"{target.loss:g}. Leave out --keep-model, or choose a higher loss."
        )
    num_tokens = math.ceil(tokens[0])
    losses = fit.predict_samples(num_parameters, num_tokens)
    return ChosenRun(
        model=model,
        num_parameters=num_parameters,
        best_size_interval=None if target.keeps_model else _interval(fit, size_samples),
        num_tokens=num_tokens,
        num_tokens_interval=_interval(fit, tokens[1:]),
        loss=fit.law.predict(num_parameters, num_tokens),
        loss_interval=fit.interval(losses),
        token_samples=tokens[1:],
        notes=(*fit.notes, *describe_reach(fit, num_parameters, num_tokens, target.loss)),
    )


def _find_sizes(parameters: np.ndarray, cost: TokenCost, target: Target) -> tuple[float, np.ndarray]:
    """(the law's best size, [r] those of its samples)."""
    if target.num_tokens is not None:
        sizes = find_size_for_tokens(parameters, cost, target.num_tokens)
    else:
        assert target.loss is not None
        sizes, _ = find_cheapest_run(parameters, cost, target.loss)
    return float(sizes[0]), sizes[1:]


def _interval(fit: LossFit, values: np.ndarray) -> Interval:
    """As LossFit.interval, for values of which some are infinite."""
    tail = 50 * (1 - fit.confidence)
    return Interval(*find_percentiles(values, (tail, 100 - tail)))


def describe_reach(fit: LossFit, num_parameters: float, num_tokens: float, loss: float | None) -> list[str]:
    """What lies beyond the runs that the law was fitted to: there it is an extrapolation."""
    values = {
        "parameters": (num_parameters, [run.num_parameters for run in fit.runs]),
        "tokens": (num_tokens, [run.num_tokens for run in fit.runs]),
        "parameters x tokens": (
            num_parameters * num_tokens,
            [run.num_parameters * run.num_tokens for run in fit.runs],
        ),
    }
    notes = []
    for name, (value, seen) in values.items():
        ratio = value / max(seen)
        if ratio > 1:
            doubt = "; expect more error than the intervals say" if ratio > EXTRAPOLATION_WARNING_RATIO else ""
            notes.append(f"extrapolated: {ratio:.3g} times the {name} of the largest run{doubt}")
    lowest = min(run.loss for run in fit.runs)
    if loss is not None and loss < lowest:
        notes.append(f"extrapolated: the target loss {loss:g} is below that of every run, {lowest:.4g}")
    return notes


def plan_training(run: ChosenRun, study: Study, search: Search, operations: Operations, target: Target) -> TrainingPlan:
    """Search each number of GPUs of the study for the run, and choose. The study's model and budget are replaced."""
    study = replace(study, model=run.model, train_tokens=run.num_tokens, num_best=1)
    sizes = tuple(
        _plan_size(search.search_plans(study, num_gpus), study, run, operations, target)
        for num_gpus in study.gpu_counts
    )
    chosen = _choose_size(sizes, target)
    missing = () if chosen is not None else tuple(_list_missing(sizes, target))
    return TrainingPlan(target=target, run=run, sizes=sizes, chosen=chosen, missing=missing)


def _plan_size(
    size: SizeProjection, study: Study, run: ChosenRun, operations: Operations, target: Target
) -> PlannedSize:
    best = size.best
    if best is None:
        return PlannedSize(num_gpus=size.num_gpus, problem=size.problem)
    good = estimate_goodput(build_row(best, rank=1), run.num_tokens, operations)
    if good.problem is not None:
        return PlannedSize(num_gpus=size.num_gpus, problem=good.problem)
    random = np.random.default_rng(operations.seed)
    tokens = random.choice(run.token_samples, NUM_SAMPLES)
    days = draw_days(good, np.ceil(tokens / best.plan.tokens_per_step), operations)
    low, middle, high = find_percentiles(days, BAND)
    price = study.usd_per_gpu_hour
    per_day = None if price is None else 24 * size.num_gpus * price
    return PlannedSize(
        num_gpus=size.num_gpus,
        good=good,
        days=middle,
        days_interval=Interval(low, high),
        cost_usd=None if per_day is None else per_day * middle,
        cost_usd_interval=None if per_day is None else Interval(per_day * low, per_day * high),
        chance_ratio=_find_chance(days, per_day, target),
    )


def _find_chance(days: np.ndarray, usd_per_day: float | None, target: Target) -> float | None:
    """Share of the drawn runs within the deadline and the budget; None where neither is set."""
    if target.deadline_days is None and target.budget_usd is None:
        return None
    is_met = np.isfinite(days)
    if target.deadline_days is not None:
        is_met &= days <= target.deadline_days
    if target.budget_usd is not None:
        assert usd_per_day is not None, "a budget needs a price"
        is_met &= days * usd_per_day <= target.budget_usd
    return float(is_met.mean())


def _choose_size(sizes: Sequence[PlannedSize], target: Target) -> PlannedSize | None:
    """Of the sizes that meet the limits more often than not, the one of the fewest GPU-days.

    Without a limit, there is no reason to prefer fast to cheap, so it is the cheapest one as well.
    """
    met = [
        size
        for size in sizes
        if size.days is not None
        and math.isfinite(size.days)
        and (size.chance_ratio is None or size.chance_ratio >= 0.5)
    ]
    return min(met, key=lambda size: size.num_gpus * (size.days or 0.0), default=None)


def _list_missing(sizes: Sequence[PlannedSize], target: Target) -> list[str]:
    """Why no size is good enough: the nearest miss of each limit, or that nothing fits."""
    problems = [size.problem for size in sizes if size.problem is not None]
    ended = [size for size in sizes if size.days is not None and math.isfinite(size.days)]
    if not ended:
        return problems or ["target-loss: must be reached in most samples of the law, got fewer. Choose a higher loss."]
    missing = []
    fastest = min(ended, key=lambda size: size.days or 0.0)
    if target.deadline_days is not None and (fastest.days or 0.0) > target.deadline_days:
        missing.append(
            f"deadline-days: must leave time for the run, got {target.deadline_days:g} where the fastest size, "
            f"{fastest.num_gpus:,} GPUs, takes {fastest.days:.4g}. Add larger sizes to --gpus, or lower the target."
        )
    cheapest = min(ended, key=lambda size: size.cost_usd or 0.0)
    if target.budget_usd is not None and (cheapest.cost_usd or 0.0) > target.budget_usd:
        missing.append(
            f"budget-usd: must pay for the run, got {target.budget_usd:,.0f} where the cheapest size, "
            f"{cheapest.num_gpus:,} GPUs, costs {cheapest.cost_usd:,.0f}. Raise it, or lower the target."
        )
    if not missing:
        missing.append(
            f"deadline-days: no size meets deadline and budget together, got {target.deadline_days} days and "
            f"{target.budget_usd} USD: the fastest takes {fastest.days:.4g} days for {fastest.cost_usd:,.0f} USD, the "
            f"cheapest {cheapest.days:.4g} days for {cheapest.cost_usd:,.0f} USD. Relax one of the two."
        )
    return missing
