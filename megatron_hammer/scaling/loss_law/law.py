"""The loss that a training run ends at, from its parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta.

Fitted as approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556); `solver.py` has the objective. The intervals are
percentiles over bootstrap samples of whole runs. Besiroglu et al. 2024 (arXiv 2404.10102) found three faults in
practice. An optimizer stops early because the loss is averaged: here it is summed, and tested against a second
optimizer. Intervals are far too narrow for the number of runs: here a test plants laws and counts how often the
intervals contain them. Parameters are rounded before use: here JSON has all digits. Runs that differ in tokenizer,
data, schedule or batch are not samples of one law, which this code cannot see unless it is told.

`runs.py` reads runs, `optimum.py` finds the best size, `report.py` shows the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from megatron_hammer.errors import DataError
from megatron_hammer.scaling.loss_law.solver import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    NUM_PARAMETERS,
    SAMPLE_ITERATIONS,
    SAMPLE_TOLERANCE,
    SMALLEST_LOG_SHARE,
    solve,
    solve_from_starts,
)

MIN_RUNS: Final = NUM_PARAMETERS + 1
MIN_DISTINCT: Final = 3  # sizes, and numbers of tokens: a curve of two numbers above a floor needs three points
# Where D is a power of N in every run, both terms are powers of N alone.
MAX_CORRELATION: Final = 0.98
SMALL_RANGE_RATIO: Final = 4.0
_MAX_DRAWS_PER_SAMPLE: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRun:
    """One finished run: a point of the law."""

    name: str
    source: str  # the file that it was read from
    num_parameters: int
    num_tokens: int
    loss: float  # nats per token at the end of the run
    loss_source: str  # what `loss` is, in words
    tokenizer: str | None = None  # whatever tells tokenizers apart; None: not known
    flops_per_token: int | None = None  # in the convention asked for; None: only 6 N D is
    notes: tuple[str, ...] = ()


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, num_parameters: float, num_tokens: float) -> float:
        return self.E + self.A / num_parameters**self.alpha + self.B / num_tokens**self.beta


@dataclass(frozen=True, kw_only=True, slots=True)
class LossFit:
    """A fitted law, with the bootstrap samples that its intervals are computed from.

    samples: [r, 5] (a, b, e, alpha, beta) of the bootstrap samples, with A = exp(a), B = exp(b), E = exp(e).
    """

    runs: tuple[LossRun, ...]
    law: LossLaw
    samples: np.ndarray
    confidence: float
    seed: int
    notes: tuple[str, ...]

    def interval(self, values: np.ndarray) -> Interval:
        """The central interval of one number per sample, at this fit's confidence."""
        tail = 50 * (1 - self.confidence)
        low, high = np.percentile(values, [tail, 100 - tail])
        return Interval(float(low), float(high))

    def intervals(self) -> dict[str, Interval]:
        """The intervals of the law's five parameters, by name."""
        columns = {name: np.exp(self.samples[:, place]) for name, place in (("E", 2), ("A", 0), ("B", 1))}
        columns |= {"alpha": self.samples[:, 3], "beta": self.samples[:, 4]}
        return {name: self.interval(values) for name, values in columns.items()}

    def predict_samples(self, num_parameters: np.ndarray | float, num_tokens: np.ndarray | float) -> np.ndarray:
        """[r]: the loss predicted by each sample's law, at one (N, D) or at each sample's own."""
        a, b, e, alpha, beta = self.samples.T
        return np.exp(e) + np.exp(a - alpha * np.log(num_parameters)) + np.exp(b - beta * np.log(num_tokens))

    def log_residuals(self) -> np.ndarray:
        """[n]: log of measured over fitted loss, run by run."""
        fitted = [self.law.predict(run.num_parameters, run.num_tokens) for run in self.runs]
        return np.log([run.loss for run in self.runs]) - np.log(fitted)


def fit_loss_law(
    runs: Sequence[LossRun], *, num_samples: int = 1000, confidence: float = 0.9, seed: int = 0
) -> LossFit:
    """Fit the law to these runs and to `num_samples` bootstrap samples. Raises DataError if they determine no law."""
    problems = find_fit_problems(runs)
    if problems:
        raise DataError(*problems)
    sizes, tokens, losses = as_points(runs)
    best = solve_from_starts(sizes, tokens, losses)
    weights = draw_samples(sizes, tokens, num_samples, np.random.default_rng(seed))
    samples, _ = solve(
        sizes,
        tokens,
        losses,
        weights,
        np.tile(best, (num_samples, 1)),
        max_iterations=SAMPLE_ITERATIONS,
        tolerance=SAMPLE_TOLERANCE,
    )
    a, b, e, alpha, beta = (float(value) for value in best)
    law = LossLaw(E=float(np.exp(e)), A=float(np.exp(a)), B=float(np.exp(b)), alpha=alpha, beta=beta)
    return LossFit(
        runs=tuple(runs),
        law=law,
        samples=samples,
        confidence=confidence,
        seed=seed,
        notes=_describe_doubts(runs, law, samples),
    )


def as_points(runs: Sequence[LossRun]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([n] parameters, [n] tokens, [n] losses)."""
    return (
        np.array([run.num_parameters for run in runs], dtype=float),
        np.array([run.num_tokens for run in runs], dtype=float),
        np.array([run.loss for run in runs]),
    )


def draw_samples(sizes: np.ndarray, tokens: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    """[num_samples, n]: how often each run is in each sample of n drawn with replacement.

    A sample that cannot be fitted (too few different runs, sizes or numbers of tokens) is drawn again.
    """
    num_runs = len(sizes)
    size_ids, token_ids = (np.unique(values, return_inverse=True)[1] for values in (sizes, tokens))
    rows: list[np.ndarray] = []
    for _ in range(_MAX_DRAWS_PER_SAMPLE):
        drawn = random.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_samples)
        is_in = drawn > 0
        num_sizes = np.stack([is_in[:, size_ids == i].any(1) for i in range(size_ids.max() + 1)]).sum(0)
        num_tokens = np.stack([is_in[:, token_ids == i].any(1) for i in range(token_ids.max() + 1)]).sum(0)
        usable = (is_in.sum(1) >= NUM_PARAMETERS) & (num_sizes >= MIN_DISTINCT) & (num_tokens >= MIN_DISTINCT)
        rows += list(drawn[usable])
        if len(rows) >= num_samples:
            return np.array(rows[:num_samples], dtype=float)
    raise DataError(
        f"runs: too few for a bootstrap, got {num_runs} of which hardly a resampling has {MIN_DISTINCT} sizes and "
        f"{MIN_DISTINCT} numbers of tokens. Add runs."
    )


def find_fit_problems(runs: Sequence[LossRun]) -> list[str]:
    """Every reason why these runs do not determine a law; empty if they do."""
    problems = [
        f"{run.source}: run {run.name} must have a positive, finite {field}, got {value}. "
        f"It diverged or the row is wrong: leave it out with --leave-out {run.name}."
        for run in runs
        for field, value in (("loss", run.loss), ("num_parameters", run.num_parameters), ("num_tokens", run.num_tokens))
        if not (np.isfinite(value) and value > 0)
    ]
    if problems:
        return problems
    tokenizers = sorted({run.tokenizer for run in runs if run.tokenizer is not None})
    if len(tokenizers) > 1:
        problems.append(
            f"runs: must share one tokenizer, since a loss is per token, got {', '.join(tokenizers)}. Fit each apart."
        )
    num_sizes = len({run.num_parameters for run in runs})
    num_tokens = len({run.num_tokens for run in runs})
    if len(runs) < MIN_RUNS or num_sizes < MIN_DISTINCT or num_tokens < MIN_DISTINCT:
        problems.append(
            f"runs: must be at least {MIN_RUNS} of at least {MIN_DISTINCT} sizes and {MIN_DISTINCT} numbers of tokens "
            f"for five parameters, got {len(runs)} runs of {num_sizes} sizes and {num_tokens} numbers of tokens. "
            f"Train more."
        )
        return problems
    sizes, tokens, _ = as_points(runs)
    correlation = np.corrcoef(np.log(sizes), np.log(tokens))[0, 1]
    if abs(correlation) > MAX_CORRELATION:
        problems.append(
            f"runs: sizes and tokens must vary apart from one another, got a correlation of {correlation:.3f} between "
            f"log N and log D. Train some sizes on several numbers of tokens."
        )
    return problems


def _describe_doubts(runs: Sequence[LossRun], law: LossLaw, samples: np.ndarray) -> tuple[str, ...]:
    """Warnings that a reader should know before trusting the law."""
    sizes, tokens, losses = as_points(runs)
    notes = []
    for name, values in (("N", sizes), ("D", tokens)):
        ratio = values.max() / values.min()
        if ratio < SMALL_RANGE_RATIO:
            notes.append(f"{name} varies by a factor of {ratio:.2g} only: its exponent is hardly determined")
    floor = losses.min() * np.exp(SMALLEST_LOG_SHARE + 1)
    terms = {
        "E": law.E,
        "A / N^alpha": law.A / np.exp(np.log(sizes).mean() * law.alpha),
        "B / D^beta": law.B / np.exp(np.log(tokens).mean() * law.beta),
    }
    notes += [f"{name} vanished: these runs do not show it" for name, value in terms.items() if value < floor]
    for name, value, column in (("alpha", law.alpha, samples[:, 3]), ("beta", law.beta, samples[:, 4])):
        at_bound = np.mean((column <= MIN_EXPONENT * 1.01) | (column >= MAX_EXPONENT * 0.999))
        if value <= MIN_EXPONENT * 1.01 or value >= MAX_EXPONENT * 0.999 or at_bound > 0.05:
            notes.append(
                f"{name} stands at a bound of the search ({MIN_EXPONENT:g} to {MAX_EXPONENT:g}) in "
                f"{at_bound:.0%} of the samples: these runs do not determine it"
            )
    return tuple(notes)
