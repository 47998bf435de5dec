"""The solver finds exact laws exactly, and on noisy points nothing that a second optimizer can improve."""

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron_hammer.scaling.loss_law.law import as_points
from megatron_hammer.scaling.loss_law.solver import HUBER_DELTA, build_starts, solve, solve_from_starts
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses

LAW = np.array([np.log(TRUE_LAW.A), np.log(TRUE_LAW.B), np.log(TRUE_LAW.E), TRUE_LAW.alpha, TRUE_LAW.beta])


def measure_objective(parameters: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_losses: np.ndarray) -> float:
    """The objective as the paper writes it, a million times larger so that no tolerance ends the search early."""
    a, b, e, alpha, beta = parameters
    predicted = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)
    size = np.abs(predicted - log_losses)
    huber = np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
    return 1e6 * float(huber.sum())


def test_points_without_noise_give_the_law_back() -> None:
    sizes, tokens, losses = as_points(simulate_losses(noise_ratio=0.0))
    np.testing.assert_allclose(solve_from_starts(sizes, tokens, losses), LAW, rtol=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_second_optimizer_finds_nothing_lower(seed: int) -> None:
    points = as_points(simulate_losses(noise_ratio=0.01, seed=seed))
    logs = tuple(np.log(values) for values in points)
    found = solve_from_starts(*points)
    own = measure_objective(found, *logs)
    starts = [found, LAW, *build_starts(*points)[7::60]]
    others = [minimize(measure_objective, start, args=logs, method="BFGS").fun for start in starts]
    assert own <= min(others) * (1 + 1e-6)
    shifted = found + np.array([0.0, 0.0, 0.0, 1e-3, 0.0])
    assert measure_objective(shifted, *logs) > own * 1.001, "the objective must tell a wrong exponent apart"


def test_each_row_of_weights_is_a_problem_of_its_own() -> None:
    points = as_points(simulate_losses(noise_ratio=0.01))
    best = solve_from_starts(*points)
    weights = np.ones((3, len(points[2])))
    weights[1] *= 7
    weights[2, ::2] = 0
    together, objectives = solve(*points, weights, np.tile(best, (3, 1)))
    np.testing.assert_allclose(together[1], together[0], rtol=1e-6)
    assert objectives[1] == pytest.approx(7 * objectives[0], rel=1e-9)
    half = tuple(values[1::2] for values in points)
    alone, _ = solve(*half, np.ones((1, len(half[2]))), best[None])
    logs = tuple(np.log(values) for values in half)
    assert measure_objective(together[2], *logs) == pytest.approx(measure_objective(alone[0], *logs), rel=1e-4)


def test_a_term_that_is_not_there_goes_to_its_bound_and_no_further() -> None:
    sizes, tokens, losses = as_points(simulate_losses(noise_ratio=0.0))
    losses = TRUE_LAW.A / sizes**TRUE_LAW.alpha + TRUE_LAW.B / tokens**TRUE_LAW.beta
    found = solve_from_starts(sizes, tokens, losses)
    assert np.isfinite(found).all()
    assert np.exp(found[2]) < 0.01 * losses.min(), "the true law has no floor"
    np.testing.assert_allclose(found[3:], LAW[3:], rtol=0.02)
