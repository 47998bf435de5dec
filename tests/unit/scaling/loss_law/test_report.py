"""The report of a loss law: all digits for machines, every number with its interval for people, and a readable plot."""

import io
import json
from dataclasses import replace

import matplotlib.image
import pytest

from megatron_hammer.scaling.loss_law.law import LossLaw, fit_loss_law
from megatron_hammer.scaling.loss_law.optimum import TokenCost, find_optimum, six_nd_cost
from megatron_hammer.scaling.loss_law.report import LossStudy, as_object, draw_study, print_study
from tests.helpers.simulated_losses import simulate_losses


@pytest.fixture(scope="module")
def study() -> LossStudy:
    fit = fit_loss_law(
        [replace(run, notes=("a note",)) for run in simulate_losses(num_sizes=8, num_ratios=3)], num_samples=100
    )
    cost = six_nd_cost("with embeddings and head")
    hours = TokenCost(coefficient=1.5e-14, exponent=1.0, unit="GPU-seconds", definition="projected")
    optima = (find_optimum(fit, cost, 1e21), find_optimum(fit, hours, 3.6e6))
    return LossStudy(
        fit=fit, parameter_convention="with embeddings and head", cost=cost, optima=optima, notes=("mind this",)
    )


def test_the_object_predicts_what_the_fit_predicts(study: LossStudy) -> None:
    written = json.loads(json.dumps(as_object(study)))
    law = LossLaw(**written["law"])
    for run in written["runs"]:
        assert law.predict(run["num_parameters"], run["num_tokens"]) == run["fitted_loss"], "digits were lost"
    for budget in written["budgets"]:
        for name in ("num_parameters", "num_tokens", "loss"):
            low, high = budget[f"{name}_interval"]
            assert low < budget[name] < high
    assert [budget["unit"] for budget in written["budgets"]] == ["FLOPs", "GPU-seconds"]
    assert written["compute_convention"] == "C = 6 N D, no attention, N with embeddings and head"
    exponents = [entry["exponent"] for entry in written["optimum_grows_as_budget_to_the"].values()]
    assert sum(exponents) == pytest.approx(1)


def test_the_tables_say_what_is_counted_and_end_with_counts(
    study: LossStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    print_study(study)
    lines = capsys.readouterr().out.splitlines()
    assert (
        "N: parameters with embeddings and head; compute: C = 6 N D, no attention, N with embeddings and head" in lines
    )
    assert "note: 40m-5: a note" in lines
    assert "note: mind this" in lines
    assert any("1,000 GPU-hours" in line for line in lines)
    assert lines[-1].startswith("fitted: 24 runs of 8 sizes and 24 numbers of tokens, 0.")
    assert lines[-1].endswith("% root mean square error of loss, 100 bootstrap samples, 2 budgets")


def test_the_plot_is_a_picture_of_both_panels_and_always_the_same(study: LossStudy) -> None:
    picture = draw_study(study)
    pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
    height, width = pixels.shape[:2]
    assert (height, width) == (780, 1950)
    for half in (pixels[:, : width // 2, :3], pixels[:, width // 2 :, :3]):
        is_ink = (half < 0.5).any(2)
        assert 0.01 < is_ink.mean() < 0.5, "a panel is empty or full"
    assert draw_study(study) == picture
