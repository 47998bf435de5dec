"""Known laws are found within their intervals, as often as stated; runs without a law are refused."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.scaling.loss_law.law import LossRun, draw_samples, find_fit_problems, fit_loss_law
from tests.helpers.messages import assert_problems
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses

PARAMETERS = ("E", "A", "B", "alpha", "beta")


def test_exact_losses_give_the_law_back_with_no_interval() -> None:
    fit = fit_loss_law(simulate_losses(noise_ratio=0.0), num_samples=100)
    for name, (low, high) in fit.intervals().items():
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUE_LAW, name), rel=1e-4)
        assert high - low < 1e-3 * getattr(TRUE_LAW, name)
    assert fit.notes == ()


@pytest.mark.parametrize("num_sizes, num_ratios", [(3, 4), (5, 5)])
def test_intervals_hold_the_true_parameters_as_often_as_stated(num_sizes: int, num_ratios: int) -> None:
    num_seeds = 12
    num_inside = dict.fromkeys(PARAMETERS, 0)
    widths = []
    for seed in range(num_seeds):
        runs = simulate_losses(num_sizes=num_sizes, num_ratios=num_ratios, seed=seed)
        fit = fit_loss_law(runs, num_samples=100, confidence=0.9, seed=seed)
        for name, (low, high) in fit.intervals().items():
            num_inside[name] += low <= getattr(TRUE_LAW, name) <= high
        widths.append(np.subtract(*reversed(fit.intervals()["alpha"])))
    # 12 draws at 90% lie below 9 once in 40 times, for a parameter.
    assert min(num_inside.values()) >= 8, num_inside
    assert sum(num_inside.values()) >= 0.8 * num_seeds * len(PARAMETERS), num_inside
    assert np.median(widths) < 0.35, "an interval that holds everything says nothing"


def test_a_law_far_from_the_true_one_is_outside_the_intervals() -> None:
    fit = fit_loss_law(simulate_losses(replace(TRUE_LAW, alpha=0.5, A=6000.0)), num_samples=100)
    low, _ = fit.intervals()["alpha"]
    assert low > TRUE_LAW.alpha


def test_the_same_seed_gives_the_same_samples_and_another_does_not() -> None:
    runs = simulate_losses(num_sizes=3)
    first, again = (fit_loss_law(runs, num_samples=100, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.samples, again.samples)
    assert not np.array_equal(first.samples, fit_loss_law(runs, num_samples=100, seed=6).samples)


def test_every_sample_can_be_fitted() -> None:
    runs = simulate_losses(num_sizes=3, num_ratios=2)
    sizes = np.array([run.num_parameters for run in runs], dtype=float)
    tokens = np.array([run.num_tokens for run in runs], dtype=float)
    drawn = draw_samples(sizes, tokens, 200, np.random.default_rng(0))
    assert drawn.shape == (200, 6)
    assert (drawn.sum(1) == 6).all()
    for row in drawn:
        assert len(set(sizes[row > 0])) >= 3
        assert len(set(tokens[row > 0])) >= 3
        assert np.count_nonzero(row) >= 5


def change(runs: list[LossRun], **values: object) -> list[LossRun]:
    return [replace(runs[0], **values), *runs[1:]]


@pytest.mark.parametrize(
    "runs, problem",
    [
        (
            simulate_losses(num_sizes=2, num_ratios=4),
            ("runs:", "at least 6 of at least 3 sizes", "got 8 runs of 2 sizes and 8 numbers of tokens"),
        ),
        (
            simulate_losses(num_sizes=5, num_ratios=1),
            ("runs:", "at least 6 of at least 3 sizes", "got 5 runs of 5 sizes and 5 numbers of tokens"),
        ),
        (
            simulate_losses(num_sizes=8, num_ratios=1),
            ("runs:", "got a correlation of 1.000 between log N and log D"),
        ),
        (
            change(simulate_losses(), loss=float("nan")),
            ("simulated: run 40m-5", "finite loss", "got nan", "--leave-out 40m-5"),
        ),
        (
            change(simulate_losses(), num_tokens=0),
            ("simulated: run 40m-5", "finite num_tokens", "got 0", "--leave-out 40m-5"),
        ),
        (
            [replace(run, tokenizer="llama2" if n % 2 else "hammer") for n, run in enumerate(simulate_losses())],
            ("runs:", "one tokenizer", "got hammer, llama2"),
        ),
    ],
)
def test_runs_that_determine_no_law_are_refused(runs: list[LossRun], problem: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        fit_loss_law(runs)
    assert_problems(caught.value.problems, problem)


def test_one_known_tokenizer_among_unknown_ones_is_no_problem() -> None:
    assert find_fit_problems(change(simulate_losses(), tokenizer="llama2")) == []


def test_exponents_that_the_runs_barely_determine_are_reported() -> None:
    runs = [run for run in simulate_losses(num_sizes=9, num_ratios=4) if run.num_parameters < 1.5e8]
    notes = fit_loss_law(runs, num_samples=100).notes
    assert "N varies by a factor of 3.2 only: its exponent is hardly determined" in notes
