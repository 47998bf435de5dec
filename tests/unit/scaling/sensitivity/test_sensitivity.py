"""One change at a time, on a small model with the real cost model."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.search import Search
from megatron_hammer.scaling.search.search_space import SearchSpace
from megatron_hammer.scaling.sensitivity.sensitivity import Outcome, Sensitivity, estimate_sensitivity
from megatron_hammer.scaling.sensitivity.sensitivity_report import (
    build_document,
    build_table,
    describe_sensitivity,
    draw_tornado,
    format_change,
)
from megatron_hammer.scaling.sensitivity.variations import Case, apply_variation, parse_variation
from tests.helpers.toy_study import build_toy_study

CHANGES = ("network=x1", "kernels=-5%", "gpus=x2", "memory=x0.02", "batch=x0.01", "network=x0.1")


def build_case(**changes: Any) -> Case:
    fields = {
        "gpu": select_gpu("a100-sxm-80gb"),
        "cluster": select_cluster("dgx-a100"),
        "gpu_counts": (16,),
        "global_batch_size": 256,
        "memory_limit_bytes": 60 * GIB,
        "num_best": 6,
        "space": SearchSpace(micro_batch_sizes=(1, 2)),
    }
    return Case(study=build_toy_study(**(fields | changes)), coefficients=load_coefficients())


@pytest.fixture(scope="module")
def result() -> Sensitivity:
    return estimate_sensitivity(build_case(), [parse_variation(text) for text in CHANGES])


def select(result: Sensitivity, text: str) -> Outcome:
    return result.outcomes[CHANGES.index(text)]


def test_no_change_changes_nothing(result: Sensitivity) -> None:
    one = select(result, "network=x1")
    assert (one.time_ratio, one.gpu_time_ratio, one.kept_time_ratio, one.loss_ratio) == (0, 0, 0, 0)
    assert one.place == 1
    assert one.rank_correlation == pytest.approx(1.0)


def test_a_choice_between_ties_is_no_effect_of_a_change() -> None:
    """The base's best layout is the fastest without a caution, where the one to start from is another one."""
    space = SearchSpace(micro_batch_sizes=(1, 2, 4), pipeline_model_parallel_sizes=(1,), context_parallel_sizes=(1,))
    sizes = {"gpu_counts": (8,), "global_batch_size": 64, "memory_limit_bytes": 20 * GIB}
    case = build_case(preset="hammer-1b4", num_best=1, space=space, **sizes)
    base = estimate_sensitivity(case, []).base.best
    assert base is not None
    study = replace(case.study, num_best=1000)
    found = Search(predict=partial(predict_step, coefficients=case.coefficients)).search_plans(study, 8).projections
    assert base.step.total_s == min(one.step.total_s for one in found if not one.standing.cautions)
    assert base.step.total_s < found[0].step.total_s


def test_slower_kernels_cost_at_most_what_they_are_slower(result: Sensitivity) -> None:
    one = select(result, "kernels=-5%")
    assert one.time_ratio is not None
    assert 0.02 < one.time_ratio < 1 / 0.95 - 1


def test_the_layout_of_the_base_is_predicted_under_the_change(result: Sensitivity) -> None:
    one, base = select(result, "network=x0.1"), result.base.best
    assert base is not None
    assert one.kept is not None
    assert one.best is not None
    varied = apply_variation(result.case, parse_variation("network=x0.1"))
    plan = replace(base.plan, cluster=varied.study.cluster)
    assert one.kept.plan == plan
    assert one.kept.step == predict_step(plan, varied.coefficients)
    assert one.kept.memory == estimate_heaviest_plan_stage(plan)
    assert one.loss_ratio == pytest.approx(one.kept.step.total_s / one.best.step.total_s - 1)
    assert one.loss_ratio >= 0


def test_more_gpus_give_the_layout_more_replicas(result: Sensitivity) -> None:
    one, base = select(result, "gpus=x2"), result.base.best
    assert base is not None
    assert one.kept is not None
    assert one.time_ratio is not None
    assert one.kept.plan.layout.data_parallel_size == 2 * base.plan.layout.data_parallel_size
    assert one.gpu_time_ratio == pytest.approx(2 * (1 + one.time_ratio) - 1)
    assert one.time_ratio < -0.3


def test_what_has_no_result_has_its_reason(result: Sensitivity) -> None:
    nothing_fits, not_whole = select(result, "memory=x0.02"), select(result, "batch=x0.01")
    assert nothing_fits.problem is not None
    assert nothing_fits.problem.startswith("gpus: one GPU must hold its share")
    assert not_whole.problem is not None
    assert "must stay a whole number, got 2.56" in not_whole.problem
    sentences = describe_sensitivity(result)
    assert sentences[-2] == f"usable memory x0.02: {nothing_fits.problem}"
    assert [one["problem"] for one in build_document(result)["outcomes"]].count(None) == 4


def test_a_layout_that_no_longer_fits_is_said_to() -> None:
    case = build_case(num_best=1)
    base = estimate_sensitivity(case, []).base.best
    assert base is not None
    ratio = (base.memory.total_bytes - GIB) / case.study.memory_limit_bytes
    result = estimate_sensitivity(case, [parse_variation(f"memory=x{ratio:.4f}")])
    (one,) = result.outcomes
    assert one.best is not None
    assert (one.kept, one.place, one.loss_ratio, one.rank_correlation) == (None, None, None, None)
    assert "It does not fit or start with: usable memory" in describe_sensitivity(result)[1]
    assert "does not fit" in build_table(result).groups[0][1]
    assert draw_tornado(result) is None  # a single bar


def test_experts_with_unequal_loads_are_slower() -> None:
    case = build_case(preset="hammer-tiny-moe", seq_length=256, num_best=2)
    space = replace(case.study.space, expert_model_parallel_sizes=(4,))
    case = replace(case, study=replace(case.study, space=space))
    (one,) = estimate_sensitivity(case, [parse_variation("imbalance=x1.5")]).outcomes
    assert one.time_ratio is not None
    assert one.time_ratio > 0
    assert one.place == 1


def test_a_base_in_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus: one GPU must hold its share"):
        estimate_sensitivity(build_case(memory_limit_bytes=GIB), [])


def test_the_chart_is_drawn(result: Sensitivity) -> None:
    image = draw_tornado(result)
    assert image is not None
    assert image.startswith(b"\x89PNG")


def test_a_change_of_nothing_has_no_sign() -> None:
    assert [format_change(ratio) for ratio in (-0.0001, 0.012, None)] == ["0.0%", "+1.2%", ""]
