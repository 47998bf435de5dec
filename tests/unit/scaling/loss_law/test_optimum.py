"""The best size for a budget: against a search, against the published closed form, and with its interval."""

import re

import numpy as np
import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.loss_law.law import LossFit, fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import (
    TokenCost,
    allocation_exponents,
    find_optimum,
    fit_flops_cost,
    fit_token_cost,
    six_nd_cost,
)
from tests.helpers.messages import assert_problem
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses

SIX_ND = six_nd_cost("with embeddings and head")


@pytest.fixture(scope="module")
def fit() -> LossFit:
    return fit_loss_law(simulate_losses(), num_samples=100)


@pytest.mark.parametrize("cost", [SIX_ND, TokenCost(coefficient=40.0, exponent=0.9, unit="FLOPs", definition="")])
def test_no_other_size_is_better_for_the_budget(fit: LossFit, cost: TokenCost) -> None:
    optimum = find_optimum(fit, cost, 1e21)
    assert cost.estimate(optimum.num_parameters, optimum.num_tokens) == pytest.approx(1e21)
    sizes = optimum.num_parameters * np.geomspace(0.1, 10, 2001)
    losses = [fit.law.predict(size, 1e21 / cost.estimate(size, 1)) for size in sizes]
    assert sizes[np.argmin(losses)] == pytest.approx(optimum.num_parameters, rel=0.005)
    assert optimum.loss <= min(losses) * (1 + 1e-12)


def test_six_nd_is_the_published_closed_form(fit: LossFit) -> None:
    law = fit.law
    scale = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    optimum = find_optimum(fit, SIX_ND, 1e20)
    exponent = law.beta / (law.alpha + law.beta)
    assert optimum.num_parameters == pytest.approx(scale * (1e20 / 6) ** exponent)
    assert optimum.num_tokens == pytest.approx((1e20 / 6) ** (1 - exponent) / scale)
    assert allocation_exponents(fit, SIX_ND)["N"][0] == pytest.approx(exponent)


def test_intervals_hold_the_true_optimum(fit: LossFit) -> None:
    optimum = find_optimum(fit, SIX_ND, 1e21)
    scale = (TRUE_LAW.alpha * TRUE_LAW.A / (TRUE_LAW.beta * TRUE_LAW.B)) ** (1 / (TRUE_LAW.alpha + TRUE_LAW.beta))
    size = scale * (1e21 / 6) ** (TRUE_LAW.beta / (TRUE_LAW.alpha + TRUE_LAW.beta))
    low, high = optimum.num_parameters_interval
    assert low < size < high < 2 * low
    low, high = optimum.loss_interval
    assert low < TRUE_LAW.predict(size, 1e21 / 6 / size) < high
    low, high = optimum.num_tokens_interval
    assert low < 1e21 / 6 / size < high


def test_a_budget_beyond_the_runs_is_noted(fit: LossFit) -> None:
    assert find_optimum(fit, SIX_ND, 1e20).notes == ()
    largest = 6 * 4e9 * 80 * 4e9
    assert find_optimum(fit, SIX_ND, 10 * largest).notes == (f"{10 * largest:.3g} FLOPs is 10 times the largest run",)
    (far,) = find_optimum(fit, SIX_ND, 200 * largest).notes
    assert_problem(far, f"{200 * largest:.3g} FLOPs is 200 times the largest run", "more error than the interval")


def test_a_cost_is_a_power_through_its_sizes() -> None:
    cost = fit_token_cost([1e8, 1e9, 1e10], [3e9, 2.4e10, 1.92e11], unit="FLOPs", definition="convention A")
    assert cost.exponent == pytest.approx(np.log10(8))
    assert cost.estimate(1e9, 10) == pytest.approx(2.4e11)
    assert cost.definition.startswith("convention A, as ")
    assert cost.definition.endswith("N^0.9031 per token (within 0.0%)")
    alone = fit_token_cost([1e9], [7e-5], unit="GPU-seconds", definition="projected")
    assert alone.estimate(2e9, 1) == pytest.approx(1.4e-4)
    assert alone.definition == "projected, taken as proportional to N from one size"


def test_a_convention_needs_the_models_of_all_runs(fit: LossFit) -> None:
    with pytest.raises(
        ConfigError, match=re.escape("flops: convention A needs the model of every run, got none for 40m-5, ")
    ):
        fit_flops_cost(fit.runs, "A", "causal")
