"""The best model size and number of tokens for a budget, by a fitted loss law, with intervals.

A token costs a power of the size, c * N^e. By default that is 6 N FLOPs. It can also be FLOPs in one of the conventions
of model/flops.py, or GPU-seconds of projected throughputs, with c and e fitted to the given sizes. With D = K / N^e and
K = budget / c, the minimum of L(N, D) has a closed form (equation 4 of Hoffmann et al. 2022, arXiv 2203.15556, is the
case e = 1, c = 6):

    N_opt^(alpha + e beta) = alpha A K^beta / (e beta B)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.loss_law.law import Interval, LossFit, LossRun

EXTRAPOLATION_WARNING_RATIO = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """coefficient * N^exponent of `unit` per trained token."""

    coefficient: float
    exponent: float
    unit: str
    definition: str  # in words, for the reader

    def estimate(self, num_parameters: float, num_tokens: float) -> float:
        return self.coefficient * num_parameters**self.exponent * num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The best use of a budget. The interval of each number has the same name with `_interval`."""

    budget: float
    cost: TokenCost
    num_parameters: float
    num_parameters_interval: Interval
    num_tokens: float
    num_tokens_interval: Interval
    loss: float
    loss_interval: Interval
    notes: tuple[str, ...]


def six_nd_cost(parameter_convention: str) -> TokenCost:
    """Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1; convention C of model/flops.py."""
    return TokenCost(
        coefficient=6.0, exponent=1.0, unit="FLOPs", definition=f"C = 6 N D, no attention, N {parameter_convention}"
    )


def fit_token_cost(
    sizes: Sequence[float], costs_per_token: Sequence[float], *, unit: str, definition: str
) -> TokenCost:
    """A power of the size, fitted to these costs by least squares of logarithms; for one size, proportional to it."""
    log_n, log_cost = np.log(np.array(sizes, dtype=float)), np.log(np.array(costs_per_token, dtype=float))
    if len(set(sizes)) == 1:
        coefficient = float(np.exp((log_cost - log_n).mean()))
        return TokenCost(
            coefficient=coefficient,
            exponent=1.0,
            unit=unit,
            definition=f"{definition}, taken as proportional to N from one size",
        )
    exponent, log_coefficient = np.polyfit(log_n, log_cost, 1)
    # Two sizes are matched exactly, which says nothing about a third one.
    worst = np.abs(np.expm1(log_coefficient + exponent * log_n - log_cost)).max()
    closeness = "through two sizes" if len(set(sizes)) == 2 else f"within {worst:.1%}"
    return TokenCost(
        coefficient=float(np.exp(log_coefficient)),
        exponent=float(exponent),
        unit=unit,
        definition=f"{definition}, as {np.exp(log_coefficient):.4g} N^{exponent:.4f} per token ({closeness})",
    )


def fit_flops_cost(runs: Sequence[LossRun], convention: str, description: str) -> TokenCost:
    """FLOPs per token of these runs' own models, in convention A, B or D."""
    unknown = [run.name for run in runs if run.flops_per_token is None]
    if unknown:
        raise ConfigError(
            f"flops: convention {convention} needs the model of every run, got none for {', '.join(unknown)}. "
            f"Name a preset or a Hugging Face folder as MODEL, or use 6ND."
        )
    sizes = [float(run.num_parameters) for run in runs]
    costs = [float(run.flops_per_token or 0) for run in runs]
    return fit_token_cost(sizes, costs, unit="FLOPs", definition=f"convention {convention}: {description}")


def find_optimum(fit: LossFit, cost: TokenCost, budget: float) -> Optimum:
    """The minimum of the law for `budget`, which is in the cost's unit."""
    law = fit.law
    best = np.array([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]])
    size, tokens = (float(values[0]) for values in _split_budget(best, cost, budget))
    sizes, token_counts = _split_budget(fit.samples, cost, budget)
    largest = max(cost.estimate(run.num_parameters, run.num_tokens) for run in fit.runs)
    notes = []
    if budget > largest:
        doubt = "; expect more error than the interval says" if budget > EXTRAPOLATION_WARNING_RATIO * largest else ""
        notes.append(f"{format_budget(budget, cost)} is {budget / largest:.3g} times the largest run{doubt}")
    return Optimum(
        budget=budget,
        cost=cost,
        num_parameters=size,
        num_parameters_interval=fit.interval(sizes),
        num_tokens=tokens,
        num_tokens_interval=fit.interval(token_counts),
        loss=law.predict(size, tokens),
        loss_interval=fit.interval(fit.predict_samples(sizes, token_counts)),
        notes=tuple(notes),
    )


def format_budget(budget: float, cost: TokenCost) -> str:
    if cost.unit == "GPU-seconds":
        return f"{budget / 3600:,.4g} GPU-hours"
    return f"{budget:.3g} {cost.unit}"


def allocation_exponents(fit: LossFit, cost: TokenCost) -> dict[str, tuple[float, Interval]]:
    """The exponents by which the best N and D grow with the budget, N ~ C^a and D ~ C^b, each with its interval."""

    def exponents(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = alpha + cost.exponent * beta
        return beta / total, alpha / total

    law_a, law_b = exponents(np.array(fit.law.alpha), np.array(fit.law.beta))
    sample_a, sample_b = exponents(fit.samples[:, 3], fit.samples[:, 4])
    return {"N": (float(law_a), fit.interval(sample_a)), "D": (float(law_b), fit.interval(sample_b))}


def _split_budget(parameters: np.ndarray, cost: TokenCost, budget: float) -> tuple[np.ndarray, np.ndarray]:
    """([r] best sizes, [r] best numbers of tokens), one for each row (a, b, e, alpha, beta)."""
    a, b, _, alpha, beta = parameters.T
    log_budget_at_one = np.log(budget / cost.coefficient)
    growth = alpha + cost.exponent * beta
    log_size = (np.log(alpha / (cost.exponent * beta)) + a - b + beta * log_budget_at_one) / growth
    return np.exp(log_size), np.exp(log_budget_at_one - cost.exponent * log_size)
