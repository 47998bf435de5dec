"""How often a job on so many GPUs is interrupted: one rate per GPU and day, with the spread between clusters.

Failures are taken as independent between GPUs and over time, so the rate of a job is the number of its GPUs times the
rate of one. Kokolis et al. 2025 (arXiv 2410.21680) measured jobs of 1,024 GPUs that failed 3.6 times as often as their
own rate says. Small jobs fail for more reasons than hardware, so this rate is optimistic for them.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml
from megatron_hammer.scaling.plan import PositiveFloat, PositiveInt, Text

FAILURES_PATH = Path(__file__).resolve().parent / "failures.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureCount:
    """One published count; failures.toml explains the fields."""

    num_gpus: PositiveInt
    days: PositiveFloat
    failures: PositiveFloat
    counted: Text
    source: Text

    @property
    def per_gpu_day(self) -> float:
        return self.failures / (self.num_gpus * self.days)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureRate:
    """Failures per GPU and day: the typical cluster's, and how far another cluster's may be from it.

    num_sources: of which the spread was computed. 0 for a rate that the user knows; it has no spread.
    """

    per_gpu_day: float
    log_deviation: float = 0.0  # standard deviation of the logarithm between clusters
    num_sources: int = 0

    def draw(self, random: np.random.Generator, num_samples: int) -> np.ndarray:
        """[num_samples]: rates that a new cluster may have: a log-normal whose mean and spread are both estimated."""
        if self.num_sources < 2:
            return np.full(num_samples, self.per_gpu_day)
        # The predictive distribution of one more normal value is Student's t, wider by the error of the mean.
        steps = random.standard_t(self.num_sources - 1, num_samples) * math.sqrt(1 + 1 / self.num_sources)
        return self.per_gpu_day * np.exp(self.log_deviation * steps)


@functools.cache
def load_failure_counts() -> Mapping[str, FailureCount]:
    """The shipped counts by name."""
    remedy = "Install the package again."
    return read_toml(FAILURES_PATH, dict[str, FailureCount], remedy=remedy, raises=ConfigError, allows_unknown=False)


def estimate_failure_rate(counts: Mapping[str, FailureCount] | None = None) -> FailureRate:
    """The geometric mean of the clusters, each counted once: a long count of one says nothing of another."""
    counts = load_failure_counts() if counts is None else counts
    logs = np.log([count.per_gpu_day for count in counts.values()])
    return FailureRate(
        per_gpu_day=float(np.exp(logs.mean())), log_deviation=float(logs.std(ddof=1)), num_sources=len(logs)
    )
