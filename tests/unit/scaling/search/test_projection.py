"""Speed, MFU, time, energy, cost, the knee and the companion study, by hand."""

from dataclasses import replace
from fractions import Fraction

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout, StageMemory, count_flops_per_token
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.plan import PARTS, StepTime
from megatron_hammer.scaling.search.projection import (
    COMPUTE_PARTS,
    LOSS_PARTS,
    MEMORY_NAMES,
    PART_NAMES,
    Projection,
    SizeProjection,
    build_companion_study,
    estimate_bill,
    estimate_mfu_ratio,
    find_knee,
    scaling_efficiency_ratio,
    select_peak_tflops,
)
from megatron_hammer.scaling.search.search import Search
from tests.helpers.messages import raises_problem
from tests.helpers.toy_study import CLUSTER, GPU, build_toy_study, predict, project_toy_study


def build_projection(num_gpus: int, tokens_per_s_per_gpu: float = 1000.0) -> Projection:
    """A plan of the toy study with a step time that gives this speed."""
    best = Search(predict=predict).search_plans(build_toy_study(num_best=1), 4).best
    assert best is not None
    plan = replace(best.plan, layout=ParallelLayout(data_parallel_size=num_gpus))
    total_s = plan.tokens_per_step / tokens_per_s_per_gpu / plan.layout.world_size
    parts = dict.fromkeys(PARTS, 0.0) | {
        "matmul_s": 0.75 * total_s,
        "bubble_s": 0.15 * total_s,
        "jitter_s": 0.1 * total_s,
    }
    step = StepTime(**parts, low_s=0.8 * total_s, high_s=1.5 * total_s)
    return Projection(plan=plan, step=step, memory=best.memory)


def build_size(num_gpus: int, tokens_per_s_per_gpu: float | None) -> SizeProjection:
    projections = () if tokens_per_s_per_gpu is None else (build_projection(num_gpus, tokens_per_s_per_gpu),)
    return SizeProjection(num_gpus=num_gpus, global_batch_size=32, num_candidates=1, projections=projections)


def build_sizes(speeds: dict[int, float | None]) -> list[SizeProjection]:
    return [build_size(num_gpus, speed) for num_gpus, speed in speeds.items()]


def test_speed_and_bottleneck() -> None:
    projection = build_projection(12, 500.0)
    assert projection.num_gpus == 12
    assert projection.num_nodes == 2  # of 8
    assert projection.tokens_per_s_per_gpu == pytest.approx(500.0)
    assert projection.bottleneck == "bubble_s"


def test_mfu_is_by_hand() -> None:
    projection = build_projection(8, 1000.0)
    for letter in ("A", "C"):
        flops = count_flops_per_token(projection.plan.model, 2048, letter)
        assert estimate_mfu_ratio(projection, letter) == pytest.approx(1000.0 * flops / 100e12)


def test_the_bill_is_by_hand() -> None:
    projection = build_projection(16, 1000.0)  # 16,000 tokens per second; 65,536 tokens per step
    bill = estimate_bill(projection, train_tokens=10**9, usd_per_gpu_hour=3.0)
    assert bill.num_steps == 15_259  # the last one is not full
    elapsed_s = 15_259 * 65_536 / 16_000
    assert bill.days == pytest.approx(elapsed_s / 86_400)
    assert (bill.low_days, bill.high_days) == pytest.approx((0.8 * bill.days, 1.5 * bill.days))
    assert bill.gpu_hours == pytest.approx(16 * elapsed_s / 3600)
    assert bill.energy_mwh == pytest.approx((16 * 400 + 2 * 800) * 1.25 * elapsed_s / 3.6e9)
    assert bill.cost_usd == pytest.approx(3.0 * bill.gpu_hours)
    assert estimate_bill(projection, train_tokens=10**9, usd_per_gpu_hour=None).cost_usd is None


def test_a_format_that_the_gpu_lacks_is_refused() -> None:
    with raises_problem(ConfigError, "precision:", "got precision=fp8, gpu=toy-gpu", "fp32, fp16, bf16"):
        select_peak_tflops(GPU, "fp8")
    assert select_peak_tflops(GPU, "fp32") == 50.0


def test_efficiency_is_relative_to_the_smallest_size_that_fits() -> None:
    sizes = build_sizes({4: None, 8: 1000.0, 16: 900.0})
    assert [scaling_efficiency_ratio(sizes, size) for size in sizes] == [None, 1.0, pytest.approx(0.9)]
    assert scaling_efficiency_ratio([build_size(4, None)], build_size(4, None)) is None


def test_the_knee_is_the_last_size_before_speed_a_gpu_falls() -> None:
    knee = find_knee(build_sizes({8: 1000.0, 16: 950.0, 32: 850.0, 64: 700.0, 128: 900.0}), 0.8)
    assert knee is not None
    assert (knee.num_gpus, knee.num_gpus_beyond) == (32, 64)
    assert knee.ratio == pytest.approx(0.85)


def test_a_slow_smallest_size_does_not_hide_the_knee() -> None:
    """Memory is so tight at 8 that everything beyond looks good against it; 64 is still a fifth below 16."""
    knee = find_knee(build_sizes({8: 500.0, 16: 1000.0, 32: 900.0, 64: 790.0}), 0.8)
    assert knee is not None
    assert (knee.num_gpus, knee.num_gpus_beyond) == (32, 64)


def test_no_knee() -> None:
    within = find_knee(build_sizes({16: 900.0, 4: None, 8: 1000.0}), 0.8)
    assert within is not None
    assert (within.num_gpus, within.num_gpus_beyond) == (16, None)
    assert find_knee(build_sizes({8: None}), 0.8) is None


def test_a_fixed_batch_gets_a_companion_study_that_grows_with_the_gpus() -> None:
    study = build_toy_study(gpu_counts=(2, 4, 8, 12, 16), global_batch_size=36)
    sizes = build_sizes({2: None, 4: 1.0, 8: 1.0, 12: 1.0, 16: 1.0})
    companion = build_companion_study(study, sizes)
    assert companion is not None
    assert (companion.global_batch_size, companion.samples_per_gpu) == (None, Fraction(3))
    assert [companion.global_batch_size_at(count) for count in (4, 12)] == [12, 36]
    assert companion.num_best == 1
    halves = build_companion_study(replace(study, global_batch_size=6), sizes)
    assert halves is not None
    assert halves.samples_per_gpu == Fraction(1, 2)
    odd = build_companion_study(replace(study, global_batch_size=4), sizes)
    assert odd is not None
    assert odd.gpu_counts == (12,)  # a third of a sample a GPU makes no whole batch elsewhere


def test_a_growing_batch_gets_a_companion_study_of_a_fixed_batch() -> None:
    study = build_toy_study(global_batch_size=None, samples_per_gpu=Fraction(1, 2))
    assert study.is_weak
    assert study.global_batch_size_at(16) == 8
    companion = build_companion_study(study, build_sizes({4: 1.0, 8: 1.0, 16: 1.0}))
    assert companion is not None
    assert (companion.global_batch_size, companion.samples_per_gpu) == (4, None)
    assert build_companion_study(study, build_sizes({4: None})) is None


def test_every_part_of_time_and_memory_has_a_name() -> None:
    assert tuple(PART_NAMES) == PARTS
    assert {*COMPUTE_PARTS, *LOSS_PARTS} == set(PARTS)
    fields = {name for name in StageMemory.__dataclass_fields__ if name.endswith("_bytes")}
    assert set(MEMORY_NAMES) == fields - {"host_bytes"}  # not on the GPU


def test_the_toy_study_has_a_projection() -> None:
    result = project_toy_study(build_toy_study(memory_limit_bytes=38 * GIB))
    assert [size.num_gpus for size in result.sizes] == [4, 8, 16]
    assert all(size.best and size.best.plan.cluster == CLUSTER for size in result.sizes)
