"""Fits find known coefficients, keep those without evidence, and are not dominated by one large table."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.scaling.cost.coefficients import (
    GPU_PRIORS,
    build_prior_coefficients,
    flatten_coefficients,
    replace_values,
)
from megatron_hammer.scaling.cost.expert_coefficients import EXPERT_NAMES
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.calibration import (
    MOST_RUNS_OF_A_SOURCE,
    fit,
    fit_fold,
    name_publication,
    select_fit_runs,
    select_free_coefficients,
    weigh_runs,
)
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH
from tests.helpers.simulated_runs import SimulatedRun, simulate_runs

PRIORS = build_prior_coefficients()
TRUE_COEFFICIENTS = replace_values(
    PRIORS, {"hopper.gemm_ratio": 0.68, "hopper.attention_ratio": 0.6, "network_ratio": 0.5, "host_s": 3e-5}
)


@pytest.fixture(scope="module")
def fitted():
    return fit(simulate_runs(TRUE_COEFFICIENTS), PRIORS)


def test_known_coefficients_are_found(fitted):
    runs = simulate_runs(TRUE_COEFFICIENTS)
    errors = [abs(predict_step(run.plan, fitted).total_s / run.step_time_s - 1) for run in runs]
    before = [abs(predict_step(run.plan, PRIORS).total_s / run.step_time_s - 1) for run in runs]
    assert max(errors) < 0.06 < 0.12 < max(before)
    # each on its way from its prior (0.72, 0.5, 0.75) to the true value; where two explain the same they share
    assert fitted.gpus["hopper"].gemm_ratio < 0.71
    assert fitted.gpus["hopper"].attention_ratio > 0.52
    assert fitted.network_ratio < 0.68


def test_coefficients_that_no_run_depends_on_stay(fitted):
    before, after = flatten_coefficients(PRIORS), flatten_coefficients(fitted)
    for name in ("ampere.gemm_ratio", "blackwell.memory_ratio", "context_exposed_ratio", "pipeline_exposed_ratio"):
        assert after[name] == before[name]
    assert after["hopper.gemm_8bit_ratio"] == before["hopper.gemm_8bit_ratio"]


def test_runs_that_agree_with_the_start_leave_it_unchanged():
    start = replace_values(PRIORS, {"hopper.gemm_ratio": 0.65, "jitter_ratio": 0.02})
    runs = simulate_runs(start)[:2]
    after = flatten_coefficients(fit(runs, start, is_prior_start=True))
    assert after == pytest.approx(flatten_coefficients(start), rel=1e-3)


def test_values_stay_within_their_bounds_however_slow_the_runs():
    slow = [dataclasses.replace(run, step_time_s=20 * run.step_time_s) for run in simulate_runs(TRUE_COEFFICIENTS)]
    after = fit(slow, PRIORS).gpus["hopper"].gemm_ratio
    assert after >= GPU_PRIORS["hopper"]["gemm_ratio"].low


def test_one_outlier_does_not_determine_the_fit():
    runs = simulate_runs(TRUE_COEFFICIENTS)
    runs[4] = dataclasses.replace(runs[4], step_time_s=3 * runs[4].step_time_s)
    fitted = fit(runs, PRIORS)
    errors = sorted(abs(predict_step(run.plan, fitted).total_s / run.step_time_s - 1) for run in runs)
    assert errors[len(errors) // 2] < 0.05


def test_only_coefficients_that_a_run_depends_on_are_fitted():
    free = {one.name: one for one in select_free_coefficients(simulate_runs(TRUE_COEFFICIENTS), PRIORS)}
    assert "hopper.gemm_ratio" in free
    assert "volta.gemm_ratio" not in free
    assert "hopper.gemm_4bit_ratio" not in free
    assert len(free["network_ratio"].runs) < len(free["hopper.gemm_ratio"].runs) + 1


def test_a_gpu_with_a_table_of_its_own_is_held_like_its_generation():
    own = dataclasses.replace(PRIORS.gpus["hopper"], gemm_ratio=0.66)
    start = dataclasses.replace(PRIORS, gpus={**PRIORS.gpus, "h100-sxm": own})
    free = {
        one.name: one for one in select_free_coefficients(simulate_runs(TRUE_COEFFICIENTS), start, is_prior_start=True)
    }
    assert "hopper.gemm_ratio" not in free  # no run is predicted with it
    assert free["h100-sxm.gemm_ratio"].prior == GPU_PRIORS["hopper"]["gemm_ratio"]._replace(value=0.66)


def test_versions_of_a_table_are_one_publication():
    assert name_publication("NVIDIA_dgxc-benchmarking_v24.11.1") == name_publication("NVIDIA_dgxc-benchmarking_v25.05")
    assert name_publication("MegatronBridge_perf_25.09") == name_publication("MegatronBridge_perf_26.02.01")
    assert name_publication("vTrain_ground_truth_multi") == name_publication("vTrain_ground_truth_single")
    assert name_publication("NVIDIA_dgxc_MaxText_v25.02") != name_publication("NVIDIA_dgxc-benchmarking_v25.02")
    assert name_publication("2024") == "2024"


def test_a_long_table_weighs_little_more_than_a_short_one():
    runs = [SimulatedRun("long", None, 1.0)] * 100 + [SimulatedRun("short", None, 1.0)] * 4
    weights = weigh_runs(runs)
    totals = np.sum(weights[:100] ** 2), np.sum(weights[100:] ** 2)
    assert 1 < totals[0] / totals[1] < 10


def test_a_very_long_table_is_thinned_out_evenly():
    runs = [SimulatedRun("long", None, float(i)) for i in range(1440)] + [SimulatedRun("short", None, 0.0)]
    chosen = select_fit_runs(runs)
    assert len(chosen) == MOST_RUNS_OF_A_SOURCE + 1
    assert [run.step_time_s for run in chosen[:3]] == [0.0, 12.0, 24.0]


def test_a_fit_without_runs_is_refused():
    with pytest.raises(DataError, match=r"^runs: must hold at least.*got none"):
        fit([], PRIORS)


def test_runs_with_experts_change_only_the_coefficients_of_experts():
    """Made with slower permutations, which are found again; the coefficients of dense models are held."""
    runs, _ = read_runs(PUBLISHED_MOE_PATH)
    chosen = [run for run in runs if run.model == "qwen3-30b-a3b"]
    truth = replace_values(PRIORS, {"experts.permute_ratio": 0.35})
    made = [dataclasses.replace(run, step_time_s=predict_step(run.plan, truth).total_s) for run in chosen]
    after = flatten_coefficients(fit(made, PRIORS))
    before = flatten_coefficients(PRIORS)
    assert after["experts.permute_ratio"] < 0.65 < before["experts.permute_ratio"]
    assert {name for name in after if after[name] != before[name]} <= {f"experts.{name}" for name in EXPERT_NAMES}
    dense = simulate_runs(TRUE_COEFFICIENTS)[:3]
    assert fit([*made, *dense], PRIORS).gpus == fit(dense, PRIORS).gpus


def test_a_fold_fits_dense_runs_once_and_experts_only_where_it_predicts_some():
    dense = simulate_runs(TRUE_COEFFICIENTS)[:3]
    experts = [run for run in read_runs(PUBLISHED_MOE_PATH)[0] if run.model == "qwen3-30b-a3b"][:2]
    known: dict[tuple[int, ...], Any] = {}
    plain = fit_fold(dense[:1], [*dense[1:], *experts], PRIORS, known)
    assert plain.experts == PRIORS.experts
    full = fit_fold(experts[:1], [*dense[1:], *experts[1:]], PRIORS, known)
    assert len(known) == 1
    assert full.gpus == plain.gpus
    assert full.experts != PRIORS.experts
