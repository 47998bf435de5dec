"""Changes of one quantity: how they are written, what they change, and which are refused."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.sensitivity.variations import (
    QUANTITIES,
    Case,
    apply_variation,
    list_usual_variations,
    parse_variation,
)
from tests.helpers.toy_study import build_toy_study

CASE = Case(study=build_toy_study(gpu_counts=(8,)), coefficients=build_prior_coefficients())


def vary(text: str, case: Case = CASE) -> Case:
    return apply_variation(case, parse_variation(text))


@pytest.mark.parametrize(
    ("text", "read", "factor"),
    [
        ("network=x0.5", lambda case: case.study.cluster.network_bytes_per_s, 0.5),
        ("network-latency=+50%", lambda case: case.study.cluster.network_latency_s, 1.5),
        ("nvlink=x2", lambda case: case.study.cluster.nvlink_bytes_per_s, 2),
        ("memory=-10%", lambda case: case.study.memory_limit_bytes, 0.9),
        ("memory=x2", lambda case: case.study.memory_limit_bytes, 2),
        ("memory-bandwidth=-10%", lambda case: case.study.gpu.memory_bytes_per_s, 0.9),
        ("kernels=-5%", lambda case: case.coefficients.gpus["ampere"].attention_ratio, 0.95),
        ("straggler=-10%", lambda case: case.coefficients.gpus["ampere"].gemm_ratio, 0.9),
        ("host=x2", lambda case: case.coefficients.host_s, 2),
        ("gpus=x2", lambda case: case.num_gpus, 2),
        ("gpus=24", lambda case: case.num_gpus, 3),
        ("batch=x0.5", lambda case: case.study.global_batch_size, 0.5),
        ("vocabulary=211578", lambda case: case.study.model.vocab_size, 2),
        ("query-groups=32", lambda case: case.study.model.num_query_groups, 8),
    ],
)
def test_one_thing_changes(text: str, read: Any, factor: float) -> None:
    varied = vary(text)
    assert read(varied) == pytest.approx(factor * read(CASE))
    # The other half of the case stays as it is.
    assert (varied.study == CASE.study) != (varied.coefficients is CASE.coefficients)


def test_a_longer_sequence_keeps_the_tokens_of_a_step() -> None:
    study = vary("seq-length=x4").study
    assert (study.seq_length, study.global_batch_size) == (4 * 2048, 8)
    weak = Case(study=replace(CASE.study, global_batch_size=None, samples_per_gpu=4), coefficients=CASE.coefficients)
    assert vary("seq-length=1024", weak).study.global_batch_size == 64
    with pytest.raises(ConfigError, match=r"seq-length: must keep the tokens of a step .*got seq_length=3000"):
        vary("seq-length=3000")


def test_a_growing_batch_grows_with_the_gpus() -> None:
    weak = Case(study=replace(CASE.study, global_batch_size=None, samples_per_gpu=4), coefficients=CASE.coefficients)
    assert vary("gpus=x2", weak).study.global_batch_size_at(16) == 64


def test_other_generations_keep_their_kernels() -> None:
    varied = vary("kernels=x0.5").coefficients
    assert varied.gpus["hopper"] == CASE.coefficients.gpus["hopper"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("network", r"vary: must be QUANTITY=CHANGE, got 'network'\. Use one of network, "),
        ("speed=x2", r"vary: must be QUANTITY=CHANGE, got 'speed=x2'"),
        ("network=25e9", r"network must be x0\.5 or -10%, got '25e9'"),
        ("network=x0.5.1", r"network must be .*got 'x0\.5\.1'"),
        ("vocabulary=-5", r"vocabulary must be x0\.5 or -10% or a number such as vocabulary=4096, got '-5'"),
        ("precision=int8", r"precision must be one of fp32.*got 'int8'"),
        ("memory=-100%", r"memory must stay above zero, got -100%"),
        ("gpus=x0.3", r"gpus must stay a whole number, got 2\.4 by x0\.3"),
        ("query-groups=5", r"query-groups: must divide the 32 heads .*got 5"),
        ("imbalance=x1.2", r"imbalance must be of a mixture of experts .*got 1\.32 for hammer-1b4"),
        ("precision=fp8", r"precision: must be a format that the GPU has, got precision=fp8"),
        ("kernels=x100", r"vary: kernels must stay within the GPU's peak, got .*_ratio 0\.\d+ times 100"),
        ("straggler=+10%", r"vary: straggler must be at most as fast as the others, got 1\.1"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        vary(text)


def test_the_usual_changes_can_all_be_written_on_the_command_line() -> None:
    usual = list_usual_variations(CASE)
    assert [parse_variation(f"{one.name}={one.change}") for one in usual] == usual
    assert {one.name for one in usual} == set(QUANTITIES) - {"precision", "imbalance"}
    mixture = Case(study=build_toy_study("hammer-tiny-moe", gpu_counts=(8,)), coefficients=CASE.coefficients)
    assert "imbalance" in {one.name for one in list_usual_variations(mixture)}
    assert [one.change for one in usual if one.name == "query-groups"] == ["2", "8", "32"]
