"""Rankings of runs that differ in layout only, and the correlation of their errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.layout_ranking import (
    estimate_layout_correlation,
    measure_layout_distances,
    rank_layouts,
    summarise_rankings,
)
from megatron_hammer.scaling.plan import PARTS, Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from tests.helpers.run_tables import write_table


def read(path: Path, *rows: dict[str, str]) -> list[MeasuredRun]:
    runs, unpredictable = read_runs(write_table(path, *rows))
    assert unpredictable == []
    return runs


def predict(run: MeasuredRun, total_s: float) -> StepTime:
    step = predict_step(run.plan)
    return replace(step, **{name: getattr(step, name) * total_s / step.total_s for name in PARTS})


def test_layouts_of_one_job_are_ranked(tmp_path: Path) -> None:
    wide = {"tp": "4", "dp": "4", "iteration_time_s": "0.75"}
    slow = {"tp": "1", "dp": "16", "iteration_time_s": "0.9"}
    other_job = {"global_batch": "128", "iteration_time_s": "0.1"}
    runs = read(tmp_path / "runs.csv", {"iteration_time_s": "0.7"}, wide, slow, other_job)
    rankings = rank_layouts(runs, [predict(run, time) for run, time in zip(runs, (0.8, 0.7, 1.0, 0.1), strict=True)])
    (ranking,) = rankings
    assert ranking.num_layouts == 3
    assert (ranking.predicted_best.row_number, ranking.measured_best.row_number) == (3, 2)
    assert ranking.loss_ratio == pytest.approx(0.75 / 0.7 - 1)
    assert "GPT-tiny x16 h100-sxm bf16, batch 64" in ranking.description
    summary = summarise_rankings(rankings)
    assert summary is not None
    assert (summary.num_groups, summary.num_within_5_percent) == (1, 0)
    assert summary.worst_loss_ratio == summary.mean_loss_ratio == ranking.loss_ratio


def test_recomputation_and_micro_batches_are_layout_and_other_jobs_are_not(tmp_path: Path) -> None:
    rows = ({"recompute": "full"}, {"micro_batch": "1"}, {"precision": "fp8"}, {"gpus": "32", "dp": "16"})
    for row, num_rankings in zip(rows, (1, 1, 0, 0), strict=True):
        runs = read(tmp_path / "runs.csv", {"micro_batch": "2"}, {"micro_batch": "2"} | row)
        assert len(rank_layouts(runs, [predict_step(run.plan) for run in runs])) == num_rankings, row
    assert summarise_rankings([]) is None


def test_a_layout_that_was_run_twice_has_its_mean_time(tmp_path: Path) -> None:
    wide = {"tp": "4", "dp": "4", "iteration_time_s": "1.0"}
    runs = read(tmp_path / "runs.csv", {"iteration_time_s": "0.7"}, {"iteration_time_s": "1.7"}, wide)
    (ranking,) = rank_layouts(runs, [predict(run, time) for run, time in zip(runs, (0.8, 0.8, 0.9), strict=True)])
    assert ranking.num_layouts == 2
    assert ranking.measured_best.row_number == 4
    assert ranking.loss_ratio == pytest.approx(1.2 / 1.0 - 1)


def build_plan(run: MeasuredRun, tp: int, pp: int, micro_batch_size: int) -> Plan:
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=64 // tp // pp,
        has_sequence_parallel=tp > 1,
    )
    return replace(run.plan, layout=layout, micro_batch_size=micro_batch_size)


def test_distances_count_doublings_and_choices(tmp_path: Path) -> None:
    (run,) = read(tmp_path / "runs.csv", {})
    one = build_plan(run, 1, 1, 1)
    plans = [one, build_plan(run, 8, 1, 1), build_plan(run, 2, 2, 4), replace(one, recompute="full", sharding="fsdp")]
    distances = measure_layout_distances(plans)
    assert distances[0].tolist() == [0, 3, 4, 2]
    assert distances[1, 2] == 2 + 1 + 2
    narrow = replace(one, shard_size=8)
    assert measure_layout_distances([one, narrow])[0, 1] == 3  # 64 ranks share, or 8 of them


@pytest.mark.parametrize("planted", [0.6, 0.9])
def test_the_correlation_that_errors_were_drawn_with_is_found(tmp_path: Path, planted: float) -> None:
    (run,) = read(tmp_path / "runs.csv", {})
    grids = [(tp, pp, micro) for tp in (1, 2, 4, 8) for pp in (1, 2) for micro in (1, 2, 4)]
    plans = [build_plan(run, *grid) for grid in grids]
    factor = np.linalg.cholesky(planted ** measure_layout_distances(plans) + 1e-9 * np.eye(len(plans)))
    random = np.random.default_rng(0)
    half_width, num_jobs = 0.12, 30
    runs, errors = [], []
    for job in range(num_jobs):
        jobs_runs = [replace(run, plan=replace(plan, global_batch_size=64 * (job + 1))) for plan in plans]
        runs += jobs_runs
        errors += (0.3 + half_width / 1.2816 * factor @ random.standard_normal(len(plans))).tolist()
    found = estimate_layout_correlation(runs, errors, [half_width] * len(runs), start=0.5)
    assert found == pytest.approx(planted, abs=0.05)
    few = len(plans) // 4
    assert estimate_layout_correlation(runs[:few], errors[:few], [half_width] * few, start=0.5) == 0.5
