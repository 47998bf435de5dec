"""Cross-validation leaves out whole publications, and its figures are of the runs that were left out."""

import dataclasses
import math

import pytest

from megatron_hammer.scaling.cost.coefficients import (
    build_prior_coefficients,
    flatten_coefficients,
    load_coefficients,
    replace_values,
)
from megatron_hammer.scaling.cost.step_time import predict_step, select_band_class, select_band_ratio
from megatron_hammer.scaling.evidence.cross_validation import (
    assess,
    calibrate,
    cross_validate,
    estimate_bands,
    find_error,
    summarise_by_publication,
    summarise_errors,
)
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_RUNS_PATH
from tests.helpers.simulated_runs import simulate_runs

PRIORS = build_prior_coefficients()
FAST = replace_values(PRIORS, {"hopper.gemm_ratio": 0.8})
SLOW = replace_values(PRIORS, {"hopper.gemm_ratio": 0.6})


def predict_all(runs, coefficients=PRIORS):
    return [(run, predict_step(run.plan, coefficients)) for run in runs]


def test_a_publication_is_predicted_by_the_others_alone():
    runs = [*simulate_runs(FAST, "fast_table_v1")[:4], *simulate_runs(SLOW, "slow_table")[:4]]
    runs += simulate_runs(FAST, "fast_table_v2")[:2]
    predictions = cross_validate(runs, PRIORS, by="publication")
    assert [run for run, _ in predictions] == runs
    biases = {name: errors.bias_ratio for name, errors in summarise_by_publication(predictions).items()}
    # each was predicted from the other's speed, so the fast one too slow and the slow one too fast
    assert biases["fast_table"] > 0.1
    assert biases["slow_table"] < -0.1
    assert summarise_by_publication(predictions)["fast_table"].num_runs == 6


def test_a_recipe_that_no_other_publication_may_show_is_predicted_by_the_start():
    runs = [*simulate_runs(FAST, "fast_table")[:2], *simulate_runs(SLOW, "slow_table")[:2]]
    predictions = cross_validate(runs, PRIORS)
    assert [step for _, step in predictions] == [predict_step(run.plan, PRIORS) for run in runs]


def test_runs_of_one_publication_are_left_out_one_by_one():
    runs = simulate_runs(SLOW, "mine")[:4]
    errors = summarise_errors(cross_validate(runs, PRIORS, is_prior_start=True))
    start = summarise_errors(predict_all(runs))
    assert errors.median_ratio < 0.5 * start.median_ratio
    alone = cross_validate(runs[:1], PRIORS)
    assert alone[0][1] == predict_step(runs[0].plan, PRIORS)


def test_errors_are_ratios_and_the_bias_has_a_sign():
    runs = simulate_runs(PRIORS)[:3]
    runs = [
        dataclasses.replace(run, step_time_s=run.step_time_s * factor)
        for run, factor in zip(runs, (0.5, 0.8, 1.25), strict=True)
    ]
    errors = summarise_errors(predict_all(runs))
    assert errors.num_runs == 3
    assert errors.median_ratio == pytest.approx(0.25)
    assert errors.mean_ratio == pytest.approx((1.0 + 0.25 + 0.2) / 3)
    assert errors.bias_ratio == pytest.approx(0.25)
    assert find_error(predict_all(runs)[0]) == pytest.approx(math.log(2))


def test_bands_hold_four_fifths_and_weigh_publications_alike():
    runs = simulate_runs(PRIORS) * 2
    errors = [0.01 * (number + 1) for number in range(len(runs))]
    runs = [
        dataclasses.replace(run, step_time_s=run.step_time_s * math.exp(error))
        for run, error in zip(runs, errors, strict=True)
    ]
    bands = estimate_bands(predict_all(runs))
    assert bands["default"] == pytest.approx(0.15)  # 15 of 18 lie within
    assert bands["hopper_16_bit"] == bands["default"]
    few = dataclasses.replace(runs[0], source="another", step_time_s=runs[0].step_time_s * 2)
    assert estimate_bands(predict_all([*runs, few, few, few]))["default"] > bands["default"]
    one = dataclasses.replace(few, plan=dataclasses.replace(few.plan, sharding="fsdp"))
    bands = estimate_bands(predict_all([*runs, one]))
    assert bands["fsdp"] == bands["default"]  # one error is no band


def test_bands_depend_on_the_number_of_gpus():
    """Twelve runs of a class at a scale have their own band. With fewer, the errors of all classes at it count."""
    small = simulate_runs(PRIORS)[0]
    large = dataclasses.replace(small, plan=enlarge(small.plan, 2048))
    other = dataclasses.replace(large, plan=dataclasses.replace(large.plan, sharding="fsdp"))
    runs = [scale_time(run, factor) for run, factor in ((small, 1.05), (large, 1.2), (other, 1.2)) for _ in range(12)]
    bands = estimate_bands(predict_all(runs[:24]))
    own = select_band_class(small.plan)
    assert bands[f"{own}, 64 GPUs and less"] == pytest.approx(math.log(1.05))
    assert bands[f"{own}, 1024 GPUs and more"] == pytest.approx(math.log(1.2))
    few = estimate_bands(predict_all(runs[:25]))
    factor = few[f"{own}, 1024 GPUs and more"] / few[own]
    assert few["fsdp, 1024 GPUs and more"] == pytest.approx(few["fsdp"] * max(factor, 1.0), rel=0.2)
    coefficients = dataclasses.replace(PRIORS, band_ratio=bands)
    assert select_band_ratio(large.plan, coefficients) == bands[f"{own}, 1024 GPUs and more"]
    middle = enlarge(small.plan, 256)
    assert select_band_ratio(middle, coefficients) == bands[own]  # no run of this scale


def enlarge(plan: Plan, num_gpus: int) -> Plan:
    layout = plan.layout
    dp = num_gpus * layout.data_parallel_size // layout.world_size
    larger = dataclasses.replace(layout, data_parallel_size=dp)
    return dataclasses.replace(plan, layout=larger, global_batch_size=plan.micro_batch_size * dp)


def scale_time(run: MeasuredRun, factor: float) -> MeasuredRun:
    return dataclasses.replace(run, step_time_s=predict_step(run.plan, PRIORS).total_s * factor)


def test_bands_of_a_user_replace_those_of_the_start_at_every_scale():
    runs = [dataclasses.replace(run, fingerprint=f"{i}") for i, run in enumerate(simulate_runs(SLOW, "mine") * 2)]
    own = select_band_class(runs[0].plan)
    start = dataclasses.replace(PRIORS, band_ratio={"default": 0.2, own: 0.1, f"{own}, 1024 GPUs and more": 0.9})
    mine = calibrate(runs, start, assess(predict_all(runs)), is_prior_start=True)
    assert f"{own}, 1024 GPUs and more" not in mine.band_ratio
    assert mine.band_ratio["default"] == 0.2


def test_a_calibrated_file_knows_its_runs_and_those_it_started_from():
    runs = simulate_runs(SLOW, "mine")[:3]
    start = dataclasses.replace(
        PRIORS,
        band_ratio={"default": 0.2, "hopper_16_bit": 0.11},
        provenance={"fingerprints": ["old-1"], "sources": {"table": 1}},
    )
    predictions = cross_validate(runs, start, is_prior_start=True)
    mine = calibrate(runs, start, assess(predictions), is_prior_start=True)
    assert mine.provenance["fingerprints"] == ["old-1", "mine-0", "mine-1", "mine-2"]
    assert mine.provenance["sources"] == {"table": 1, "mine": 3}
    assert mine.provenance["num_runs"] == 4
    assert mine.band_ratio == start.band_ratio  # three errors say nothing of a class
    assert flatten_coefficients(mine) != flatten_coefficients(start)
    fresh = calibrate(runs, start, assess(predictions))
    assert fresh.provenance["fingerprints"] == ["mine-0", "mine-1", "mine-2"]
    assert fresh.band_ratio["default"] != 0.2


def test_the_shipped_coefficients_predict_the_published_runs_they_were_fitted_to():
    runs, _ = read_runs(PUBLISHED_RUNS_PATH)
    predictions = predict_all([run for run in runs if run.is_megatron_style], load_coefficients())
    errors = summarise_errors(predictions)
    assert errors.num_runs > 200
    assert errors.median_ratio < 0.05
    assert errors.mean_ratio < 0.08
    assert abs(errors.bias_ratio) < 0.03
    inside = [step.low_s <= run.step_time_s <= step.high_s for run, step in predictions]
    assert sum(inside) / len(inside) >= 0.8
