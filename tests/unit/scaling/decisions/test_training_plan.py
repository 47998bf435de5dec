"""From a target to a run and a number of GPUs: choices, joint intervals, and what is missing."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.decisions.failures import FailureRate
from megatron_hammer.scaling.decisions.goodput import Operations
from megatron_hammer.scaling.decisions.training_plan import (
    ChosenRun,
    Target,
    TrainingPlan,
    choose_run,
    describe_reach,
    plan_training,
)
from megatron_hammer.scaling.loss_law.law import LossFit, fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import six_nd_cost
from megatron_hammer.scaling.search.search import Search
from tests.helpers.messages import assert_problem
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses
from tests.helpers.toy_study import build_toy_study, predict

MODEL = PRESETS["hammer-1b4"].model
RARE = Operations(failure_rate=FailureRate(per_gpu_day=1e-6))


@pytest.fixture(scope="module")
def fit() -> LossFit:
    return fit_loss_law(simulate_losses(), num_samples=200)


def choose(fit: LossFit, **target: object) -> ChosenRun:
    return choose_run(fit, six_nd_cost("total"), Target(**target), MODEL, "total")  # type: ignore[arg-type]


def plan(run: ChosenRun, target: Target, operations: Operations = RARE, **changes: object) -> TrainingPlan:
    study = build_toy_study(gpu_counts=(8, 16), usd_per_gpu_hour=2.0, **changes)
    return plan_training(run, study, Search(predict=predict), operations, target)


def test_a_loss_gives_size_and_tokens_that_the_true_law_confirms(fit: LossFit) -> None:
    run = choose(fit, loss=2.3)
    assert TRUE_LAW.predict(run.num_parameters, run.num_tokens) == pytest.approx(2.3, rel=0.01)
    assert run.loss == pytest.approx(2.3, rel=1e-6)
    assert run.best_size_interval is not None
    assert run.best_size_interval.low < run.num_parameters < run.best_size_interval.high
    assert run.num_tokens_interval.low < run.num_tokens < run.num_tokens_interval.high


def test_tokens_give_the_size_for_which_they_are_the_best(fit: LossFit) -> None:
    run = choose(fit, num_tokens=10**11)
    assert run.num_tokens == 10**11
    assert run.num_tokens_interval == (1e11, 1e11)
    again = choose(fit, loss=run.loss)
    assert again.num_parameters == pytest.approx(run.num_parameters, rel=0.1)


def test_the_model_itself_needs_more_tokens_than_the_best_size(fit: LossFit) -> None:
    kept = choose(fit, loss=2.3, keeps_model=True)
    best = choose(fit, loss=2.3)
    assert kept.model == MODEL
    assert kept.best_size_interval is None
    assert kept.num_parameters * kept.num_tokens >= 0.99 * best.num_parameters * best.num_tokens


def test_losses_that_are_not_reached(fit: LossFit) -> None:
    with pytest.raises(ConfigError, match=r"target-loss: must be above the floor E = 1\.8.*got 1\.7"):
        choose(fit, loss=1.7)
    with pytest.raises(ConfigError, match="target-loss: must be above what hammer-1b4 reaches with endless tokens"):
        choose(fit, loss=1.95, keeps_model=True)


def test_what_lies_beyond_the_runs_is_marked(fit: LossFit) -> None:
    assert describe_reach(fit, 1e9, 1e10, 2.6) == []
    far = describe_reach(fit, 4e11, 4e13, 1.9)
    assert [note.split(":")[0] for note in far] == ["extrapolated"] * 4
    assert "100 times the parameters" in far[0]
    assert "expect more error" in far[1]


def test_days_join_the_law_the_step_and_the_failures(fit: LossFit) -> None:
    run = choose(fit, loss=2.3)
    found = plan(run, Target(loss=2.3))
    assert found.chosen is not None
    size = found.sizes[0]
    assert size.good is not None
    assert size.days is not None
    assert size.days_interval is not None
    # A band of the step alone is 0.9 to 1.2; tokens of the bootstrap make it wider.
    assert size.days_interval.high / size.days_interval.low > 1.01 * 1.2 / 0.9
    exact = plan(replace(run, token_samples=np.full(10, float(run.num_tokens))), Target(loss=2.3)).sizes[0]
    assert exact.days_interval is not None
    assert exact.days is not None
    assert exact.days_interval.high / exact.days == pytest.approx(1.2, abs=0.02)
    ideal = -(-run.num_tokens // (32 * 2048)) * size.good.row.step_time_s / 86_400
    assert exact.days == pytest.approx(ideal, rel=0.02)
    assert size.cost_usd == pytest.approx(size.days * 24 * 8 * 2.0)


def test_samples_that_never_reach_the_loss_are_never_finished(fit: LossFit) -> None:
    run = choose(fit, loss=2.3)
    half = np.where(np.arange(100) < 30, np.inf, float(run.num_tokens))
    size = plan(replace(run, token_samples=half), Target(loss=2.3, deadline_days=1e6)).sizes[0]
    assert size.chance_ratio == pytest.approx(0.7, abs=0.03)
    assert size.days_interval is not None
    assert np.isinf(size.days_interval.high)


def test_the_cheapest_size_within_the_limits_is_chosen(fit: LossFit) -> None:
    run = choose(fit, loss=2.6)
    free = plan(run, Target(loss=2.6))
    small, large = free.sizes
    assert free.chosen == small
    assert small.days is not None
    assert large.days is not None
    assert small.cost_usd is not None
    assert small.chance_ratio is None
    hurried = plan(run, Target(loss=2.6, deadline_days=(small.days + large.days) / 2))
    assert hurried.chosen is not None
    assert hurried.chosen.num_gpus == 16
    assert 0.5 < (hurried.chosen.chance_ratio or 0.0) <= 1
    late = plan(run, Target(loss=2.6, deadline_days=large.days / 3))
    assert late.chosen is None
    assert_problem(late.missing[0], "deadline-days: must leave time", "16 GPUs", f"{large.days:.4g}")
    poor = plan(run, Target(loss=2.6, budget_usd=small.cost_usd / 3))
    assert poor.chosen is None
    assert_problem(poor.missing[0], "budget-usd: must pay for the run", "8 GPUs")
    both = plan(run, Target(loss=2.6, deadline_days=1.01 * large.days, budget_usd=1.01 * small.cost_usd))
    assert both.chosen is None
    assert_problem(both.missing[0], "deadline-days: no size meets deadline and budget together")


def test_a_plan_in_which_nothing_fits_says_so(fit: LossFit) -> None:
    found = plan(choose(fit, loss=2.6), Target(loss=2.6), memory_limit_bytes=GIB)
    assert found.chosen is None
    assert len(found.missing) == 2
    assert_problem(found.missing[0], "gpus: one GPU must hold its share of hammer-1b4-scaled")
