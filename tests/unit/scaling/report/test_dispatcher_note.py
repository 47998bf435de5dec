"""The sentence about another dispatcher says what the cost model computes, and only where it is worth one."""

from dataclasses import replace
from functools import partial

import pytest

from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import ExpertOptions
from megatron_hammer.scaling.report.dispatcher_note import describe_faster_dispatcher
from megatron_hammer.scaling.report.projection_tables import build_tables
from megatron_hammer.scaling.search.projection import StudyResult
from megatron_hammer.scaling.search.search import Search
from tests.helpers.toy_study import build_toy_study, project_toy_study

COEFFICIENTS = load_coefficients()


def project(preset: str, dispatcher: str = "alltoall") -> StudyResult:
    study = build_toy_study(
        preset,
        gpu=select_gpu("h100-sxm"),
        cluster=select_cluster("dgx-h100"),
        gpu_counts=(64,),
        seq_length=4096,
        global_batch_size=512,
        memory_limit_bytes=76 * 2**30,
        experts=ExpertOptions(dispatcher=dispatcher),  # type: ignore[arg-type]
    )
    size = Search(predict=partial(predict_step, coefficients=COEFFICIENTS)).search_plans(study, 64)
    return project_toy_study(study, sizes=(size,), knee=None, coefficients=COEFFICIENTS)


@pytest.fixture(scope="module")
def mixture() -> StudyResult:
    return project("qwen3-30b-a3b")


def test_the_gain_is_that_of_the_same_layout(mixture: StudyResult) -> None:
    best = mixture.sizes[0].best
    assert best is not None
    assert best.plan.layout.expert_model_parallel_size > 1
    other = replace(best.plan, experts=replace(best.plan.experts, dispatcher="deepep"))
    gain = 1 - predict_step(other, COEFFICIENTS).total_s / best.step.total_s
    sentence = describe_faster_dispatcher(mixture)
    assert f"--moe-dispatcher deepep makes the layout for 64 GPUs {gain:.0%} faster than alltoall" in sentence
    assert sentence in build_tables(mixture)[0].note


def test_nothing_is_said_where_there_is_nothing_to_gain(mixture: StudyResult) -> None:
    assert describe_faster_dispatcher(project("qwen3-30b-a3b", "deepep")) == ""
    assert describe_faster_dispatcher(project("llama3-8b")) == ""
    assert describe_faster_dispatcher(replace(mixture, coefficients=None)) == ""
