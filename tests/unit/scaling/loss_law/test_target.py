"""The closed forms against a search over a fine grid, and the cases without an answer."""

import numpy as np
import pytest

from megatron_hammer.scaling.loss_law.law import LossLaw, fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import TokenCost, find_optimum, six_nd_cost
from megatron_hammer.scaling.loss_law.target import (
    count_tokens_for_loss,
    find_cheapest_run,
    find_size_for_tokens,
    law_parameters,
)
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses

COST = TokenCost(coefficient=4.0, exponent=1.1, unit="FLOPs", definition="4 N^1.1")


def as_row(law: LossLaw) -> np.ndarray:
    return np.array([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]])


@pytest.mark.parametrize("loss", [2.0, 2.6, 3.5])
def test_no_size_on_a_grid_reaches_the_loss_for_less(loss: float) -> None:
    (size,), (tokens,) = find_cheapest_run(as_row(TRUE_LAW), COST, loss)
    assert TRUE_LAW.predict(size, tokens) == pytest.approx(loss)
    grid = np.geomspace(size / 5, size * 5, 2001)
    left = loss - TRUE_LAW.E - TRUE_LAW.A / grid**TRUE_LAW.alpha
    is_open = left > 0
    costs = [
        COST.estimate(n, (TRUE_LAW.B / rest) ** (1 / TRUE_LAW.beta))
        for n, rest in zip(grid[is_open], left[is_open], strict=True)
    ]
    assert COST.estimate(size, tokens) <= min(costs) * (1 + 1e-12)
    assert grid[is_open][int(np.argmin(costs))] == pytest.approx(size, rel=0.002)


def test_the_frontier_is_the_same_from_every_side() -> None:
    """The optimum of a budget, entered again by its loss, by its tokens and by its size."""
    fit = fit_loss_law(simulate_losses(), num_samples=100)
    cost = six_nd_cost("total")
    best = find_optimum(fit, cost, 3e21)
    parameters = law_parameters(fit)
    sizes, tokens = find_cheapest_run(parameters, cost, best.loss)
    assert (sizes[0], tokens[0]) == (pytest.approx(best.num_parameters), pytest.approx(best.num_tokens))
    assert find_size_for_tokens(parameters, cost, best.num_tokens)[0] == pytest.approx(best.num_parameters)
    assert count_tokens_for_loss(parameters, best.num_parameters, best.loss)[0] == pytest.approx(best.num_tokens)
    assert len(sizes) == 101


def test_what_cannot_be_reached_is_infinite() -> None:
    (size,), (tokens,) = find_cheapest_run(as_row(TRUE_LAW), COST, TRUE_LAW.E)
    assert np.isinf([size, tokens]).all()
    floor = TRUE_LAW.E + TRUE_LAW.A / 1e9**TRUE_LAW.alpha
    assert np.isinf(count_tokens_for_loss(as_row(TRUE_LAW), 1e9, floor))
    assert np.isfinite(count_tokens_for_loss(as_row(TRUE_LAW), 1e9, floor + 0.01))
