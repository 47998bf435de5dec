"""How often to save, and how long a run takes with failures: closed forms, which a test compares with a simulation.

A run alternates between `interval_s` of work and a save that stops it for `stall_s`. Failures come at random, one in
`mtbf_s` on average. Each costs the work since the last save that is complete, and `down_s` until the run continues.
With asynchronous saves, training stops only for the copy into host memory, and the last complete save is older by the
time of the write.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LARGEST_EXPONENT = 700.0  # of e, in a double
MOST_FAILURES = 1e12  # of a run that is still counted: more is a run that never ends
SMALL_RATIO = 1e-3  # of a limit to the mean time between failures; below, the formulas lose their digits


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveCost:
    """Seconds of one save and of one failure."""

    write_s: float  # until the save is complete
    stall_s: float  # in which training stands still; write_s with blocking saves
    down_s: float  # from a failure to the first new step: detection, restart and loading

    @property
    def lag_s(self) -> float:
        """How long training continues before a save is complete."""
        return max(0.0, self.write_s - self.stall_s)


def find_best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Work between two saves that gives the shortest run.

    Source: the higher-order estimate of Daly 2006 (Future Generation Computer Systems 22, 303-312). Where a save takes
    twice the mean time between failures or more, it is that time.
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    share = stall_s / (2 * mtbf_s)
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9) - stall_s


def estimate_run_s(work_s: float, interval_s: float, cost: SaveCost, mtbf_s: float) -> float:
    """Expected seconds of a run of `work_s`; infinite if it hardly ever reaches a save.

    Source: the complete cost function of Daly 2006, M e^(R/M) (e^(s/M) - 1) for one segment with its save. A failure
    within the lag of an asynchronous save loses the interval before it too: on average, the lag.
    """
    exponent, down = (interval_s + cost.stall_s) / mtbf_s, cost.down_s / mtbf_s
    if exponent + down > LARGEST_EXPONENT:
        return math.inf
    return work_s / interval_s * math.expm1(exponent) * (mtbf_s * math.exp(down) + cost.lag_s)


def draw_run_s(
    work_s: np.ndarray, interval_s: np.ndarray, cost: SaveCost, mtbf_s: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """[n]: seconds of n runs, each with its own work, interval and mean time between failures; inf where none ends.

    The number of failures is exact: a segment succeeds with probability e^(-s/M), so the failures before the last
    success follow a negative binomial distribution. So do the failures during restarts. Each loses a time that is
    exponential and shorter than the segment; their sum is drawn from a normal distribution of its mean and variance.
    """
    segment_s = interval_s + cost.stall_s
    num_segments = np.maximum(1.0, np.ceil(work_s / interval_s))
    failures = _draw_failures(num_segments, segment_s / mtbf_s, random)
    down_s = np.full_like(failures, cost.down_s)
    restarts = _draw_failures(failures, down_s / mtbf_s, random)
    lost_s = _draw_losses_s(failures, segment_s, mtbf_s, random) + _draw_losses_s(restarts, down_s, mtbf_s, random)
    return work_s + num_segments * cost.stall_s + failures * (cost.down_s + cost.lag_s) + lost_s


def _draw_failures(successes: np.ndarray, exponent: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Failures before so many successes, each of probability e^-exponent: a Poisson of a gamma; inf beyond counting."""
    means = random.standard_gamma(successes) * np.expm1(np.minimum(exponent, LARGEST_EXPONENT))
    countable = means < MOST_FAILURES
    counts = random.poisson(np.where(countable, means, 0.0)).astype(float)
    return np.where(countable, counts, np.inf)


def _draw_losses_s(
    failures: np.ndarray, limit_s: np.ndarray, mtbf_s: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The sum of so many exponential times of mean `mtbf_s`, each known to be shorter than `limit_s`."""
    ratio = np.minimum(limit_s / mtbf_s, LARGEST_EXPONENT)
    is_small = ratio < SMALL_RATIO  # then the times are uniform between 0 and the limit
    safe = np.maximum(ratio, SMALL_RATIO)
    rest = 1 / np.expm1(safe)
    mean = np.where(is_small, limit_s / 2, mtbf_s * (1 - safe * rest))
    variance = np.where(is_small, limit_s**2 / 12, mtbf_s**2 * (1 - safe**2 * (1 + rest) * rest))
    finite = np.where(np.isfinite(failures), failures, 0.0)
    # A few such times already add up to a nearly normal distribution.
    drawn = random.normal(finite * mean, np.sqrt(finite * variance))
    return np.where(np.isfinite(failures), np.clip(drawn, 0.0, finite * limit_s), np.inf)


def count_spares(mean_out: float, confidence: float) -> int:
    """The most nodes in repair at once, with this probability, if `mean_out` are on average.

    Nodes fail at random and are repaired independently, so the number in repair follows a Poisson distribution,
    whatever the distribution of the repair time (Palm's theorem; the queue M/G/infinity).
    """
    # Beyond this, the sum below would take long, and the normal distribution is exact to a thousandth.
    if mean_out > 1e4:
        return math.ceil(mean_out + NormalDist().inv_cdf(confidence) * math.sqrt(mean_out))
    spares, log_term = 0, -mean_out
    total = math.exp(log_term)
    while total < confidence:
        spares += 1
        log_term += math.log(mean_out / spares)
        total += math.exp(log_term)
    return spares
