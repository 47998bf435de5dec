"""The decision of a study: the size at the knee, its days with failures, what it is tied with, and the other sizes."""

from dataclasses import replace

import pytest

from megatron_hammer.scaling.decisions.goodput import Operations, estimate_goodput
from megatron_hammer.scaling.decisions.study_decision import decide_study
from megatron_hammer.scaling.hardware.catalogue import select_cluster
from megatron_hammer.scaling.report.projection_file import build_row
from megatron_hammer.scaling.search.projection import Standing, StudyResult
from tests.helpers.toy_study import build_toy_study, project_toy_study


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return project_toy_study(build_toy_study(gpu_counts=(4, 13, 8), usd_per_gpu_hour=2.5))


def test_the_knee_is_decided_with_days_and_cost(result: StudyResult) -> None:
    assert result.knee is not None
    knee = next(size.best for size in result.sizes if size.num_gpus == result.knee.num_gpus)
    assert knee is not None
    good = estimate_goodput(build_row(knee, rank=1), result.study.train_tokens, Operations())
    decision = decide_study(result)
    assert decision.headline.startswith(f"Train hammer-1b4 on {knee.num_gpus} GPUs: 10B tokens in {good.days:.3g}")
    assert " USD (" in decision.headline
    assert f"--save-interval {good.save_interval_steps}" in decision.actions[1]
    assert any("of the time makes progress" in doubt for doubt in decision.doubts)
    assert any(line.startswith("Storage: ") for line in decision.assumptions)


def test_each_size_that_fits_is_an_option(result: StudyResult) -> None:
    options = decide_study(result).options
    assert options is not None
    (rows,) = options.groups
    assert [row[0] for row in rows] == ["4", "8"]
    assert {"days", "USD", "--save-interval"} <= set(options.columns)
    free = decide_study(replace(result, study=replace(result.study, usd_per_gpu_hour=None, train_tokens=None))).options
    assert free is not None
    assert {"days", "USD", "80 % band"}.isdisjoint(free.columns)


def test_ties_and_cautions_are_said(result: StudyResult) -> None:
    def stand(size, standings):
        rows = [replace(one, standing=standing) for one, standing in zip(size.projections, standings, strict=False)]
        return replace(size, projections=tuple(rows))

    tied = Standing(chance_of_best=0.4, is_tied=True, cautions=("memory: 37 of 38 GiB",))
    sizes = tuple(stand(size, [tied, tied, Standing()]) for size in result.sizes)
    doubts = decide_study(replace(result, sizes=sizes)).doubts
    assert doubts[0] == "Its chance to be the fastest is 40%; it is tied with row 8-2: measure before you choose."
    assert doubts[1] == "Caution: memory: 37 of 38 GiB."
    alone = tuple(stand(size, [tied, Standing()]) for size in result.sizes)
    assert "no other layout shown is tied" in decide_study(replace(result, sizes=alone)).doubts[0]


def test_without_a_budget_the_step_is_decided(result: StudyResult) -> None:
    decision = decide_study(replace(result, study=replace(result.study, train_tokens=None)))
    assert " per step (" in decision.headline
    assert "tokens per second" in decision.headline


def test_cpu_hosts_have_no_failures(result: StudyResult) -> None:
    study = replace(result.study, cluster=select_cluster("cpu-host"))
    decision = decide_study(replace(result, study=study))
    assert len(decision.actions) == 1
    assert decision.assumptions == ()


def test_nothing_fits() -> None:
    decision = decide_study(project_toy_study(build_toy_study(memory_limit_bytes=2**30, gpu_counts=(2,))))
    assert decision.headline.startswith("None of these numbers of GPUs can train the model")
    assert decision.options is None
