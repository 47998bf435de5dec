"""The closed forms against published optima, and against a simulation that goes through a run failure by failure."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_hammer.scaling.decisions.checkpoint_interval import (
    SaveCost,
    count_spares,
    draw_run_s,
    estimate_run_s,
    find_best_interval_s,
)

BLOCKING = SaveCost(write_s=60.0, stall_s=60.0, down_s=900.0)
ASYNCHRONOUS = SaveCost(write_s=300.0, stall_s=5.0, down_s=900.0)


def simulate_run_s(
    work_s: float, interval_s: float, cost: SaveCost, mtbf_s: float, random: np.random.Generator
) -> float:
    """The time line of one run, event by event. A save is complete `write_s` after it began."""
    now, next_failure = 0.0, random.exponential(mtbf_s)
    done, safe, pending = 0.0, 0.0, []  # work done, work saved, (complete at, work) of saves under way
    while done < work_s:
        segment = min(interval_s, work_s - done)
        end = now + segment + cost.stall_s
        if end <= next_failure:
            done += segment
            pending.append((now + segment + cost.write_s, done))
            now = end
            continue
        safe = max([safe, *(work for complete, work in pending if complete <= next_failure)])
        now, done, pending = next_failure, safe, []
        next_failure = now + random.exponential(mtbf_s)
        while now + cost.down_s > next_failure:  # a failure during the restart begins it again
            now = next_failure
            next_failure = now + random.exponential(mtbf_s)
        now += cost.down_s
    return now


@pytest.mark.parametrize("mtbf_min, expected_min", [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_optima_that_daly_published(mtbf_min: float, expected_min: float) -> None:
    """Daly 2006, figures 3 to 5: saves of 5 minutes."""
    found = find_best_interval_s(5 * 60, mtbf_min * 60) / 60
    assert found == pytest.approx(expected_min, abs=0.5 if expected_min > 10 else 0.05)


def test_a_save_longer_than_the_time_between_failures() -> None:
    assert find_best_interval_s(100.0, 50.0) == 50.0
    assert find_best_interval_s(1000.0, 50.0) == 50.0


@pytest.mark.parametrize("cost", [BLOCKING, ASYNCHRONOUS], ids=["blocking", "asynchronous"])
def test_expected_time_is_that_of_a_simulation(cost: SaveCost) -> None:
    mtbf_s, interval_s, work_s = 7200.0, 900.0, 60 * 900.0
    random = np.random.default_rng(3)
    times = np.array([simulate_run_s(work_s, interval_s, cost, mtbf_s, random) for _ in range(1500)])
    expected = estimate_run_s(work_s, interval_s, cost, mtbf_s)
    error = times.std() / math.sqrt(len(times))
    assert abs(times.mean() - expected) < 4 * error + 0.004 * expected
    # A twin that is wrong in one part is told apart: without the restart, and with half the failures.
    assert abs(times.mean() - estimate_run_s(work_s, interval_s, replace(cost, down_s=0.0), mtbf_s)) > 0.05 * expected
    assert abs(times.mean() - estimate_run_s(work_s, interval_s, cost, 2 * mtbf_s)) > 0.05 * expected


@pytest.mark.parametrize("cost", [BLOCKING, ASYNCHRONOUS], ids=["blocking", "asynchronous"])
def test_the_spread_is_that_of_a_simulation(cost: SaveCost) -> None:
    mtbf_s, interval_s, work_s, count = 7200.0, 900.0, 60 * 900.0, 1500
    random = np.random.default_rng(4)
    times = [simulate_run_s(work_s, interval_s, cost, mtbf_s, random) for _ in range(count)]
    ones = np.ones(20_000)
    drawn = draw_run_s(work_s * ones, interval_s * ones, cost, mtbf_s * ones, random)
    for quantile in (10, 50, 90):
        assert np.percentile(drawn, quantile) == pytest.approx(np.percentile(times, quantile), rel=0.015)


@pytest.mark.parametrize("mtbf_s", [1800.0, 40_000.0])
def test_no_other_interval_is_better_in_a_simulation(mtbf_s: float) -> None:
    """The same random numbers for each interval, so that small differences are seen."""
    best = find_best_interval_s(BLOCKING.stall_s, mtbf_s)
    means = {}
    for factor in (0.4, 1.0, 2.5):
        random = np.random.default_rng(5)
        runs = [simulate_run_s(200_000.0, factor * best, BLOCKING, mtbf_s, random) for _ in range(150)]
        means[factor] = np.mean(runs)
    assert means[1.0] < means[0.4]
    assert means[1.0] < means[2.5]


def test_a_run_that_never_ends_is_infinite_and_no_error() -> None:
    assert estimate_run_s(1e6, 1e5, BLOCKING, 10.0) == math.inf
    ones = np.ones(3)
    assert np.isinf(draw_run_s(1e9 * ones, 1e6 * ones, BLOCKING, 10.0 * ones, np.random.default_rng(0))).all()
    quiet = draw_run_s(1e6 * ones, 1e4 * ones, BLOCKING, 1e18 * ones, np.random.default_rng(0))
    assert quiet == pytest.approx(1e6 + 100 * 60.0)


def test_spares_follow_the_poisson_distribution() -> None:
    """Tables of the Poisson distribution: P(X <= 4) is 0.947 and P(X <= 5) 0.983 for a mean of 2."""
    assert count_spares(2.0, 0.94) == 4
    assert count_spares(2.0, 0.95) == 5
    assert count_spares(0.0, 0.95) == 0
    drawn = np.random.default_rng(0).poisson(3000.0, 100_000)
    assert np.mean(drawn <= count_spares(3000.0, 0.95)) == pytest.approx(0.95, abs=0.003)
    assert count_spares(1e6, 0.95) == pytest.approx(1e6 + 1645, abs=2)
