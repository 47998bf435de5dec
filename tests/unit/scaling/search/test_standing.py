"""Ties, chances to be the fastest, and the layout to start from, on layouts with hand-made times and memory."""

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.layout_ranking import group_by_job
from megatron_hammer.scaling.plan import PARTS, Plan
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH
from megatron_hammer.scaling.search.projection import Projection, Standing
from megatron_hammer.scaling.search.published_reach import list_cautions
from megatron_hammer.scaling.search.search import Search, _identify_family
from megatron_hammer.scaling.search.standing import (
    build_error_covariance,
    choose_fastest,
    choose_start,
    estimate_chances,
    estimate_spread,
    find_ties,
    find_widest_tie_ratio,
    rank_families,
)
from tests.helpers.toy_study import build_toy_study, predict

CORRELATION = 0.75
SPREAD = 0.08


def build(
    total_s: float, *, tp: int = 1, micro: int = 1, memory_gib: float = 20, spread: float = SPREAD, **plan: object
) -> Projection:
    best = Search(predict=predict).search_plans(build_toy_study(num_best=1), 8).projections[0]
    layout = ParallelLayout(tensor_model_parallel_size=tp, data_parallel_size=8 // tp, has_sequence_parallel=tp > 1)
    own: Plan = replace(best.plan, layout=layout, micro_batch_size=micro, recompute="none", **plan)  # type: ignore[arg-type]
    ratio = float(np.exp(1.2816 * spread))
    parts = dict.fromkeys(PARTS, 0.0) | {"matmul_s": total_s}
    step = replace(best.step, **parts, low_s=total_s / ratio, high_s=total_s * ratio)
    # Only the total counts, which is a sum of these fields.
    sizes = {name: 0 for name in best.memory.__dataclass_fields__ if name.endswith("_bytes")}
    memory = replace(best.memory, **sizes | {"weights_bytes": round(memory_gib * GIB)})
    return Projection(plan=own, step=step, memory=memory)


def test_the_band_stands_for_a_spread() -> None:
    assert estimate_spread(build(1.0).step) == pytest.approx(SPREAD)


def test_layouts_that_differ_in_little_are_told_apart_more_finely() -> None:
    times = (1.0, 1.03, 1.03)
    fastest, near, far = build(times[0], micro=4), build(times[1], micro=2), build(times[2], tp=4, micro=1)
    # By hand: one step apart the difference has a spread of 0.08 sqrt(2 (1 - 0.75)) = 0.0566, of which 0.43 are 2.4 %.
    assert find_ties([fastest, near, far], CORRELATION) == [True, False, True]
    assert find_ties([fastest, build(1.02, micro=2)], CORRELATION) == [True, True]
    assert find_widest_tie_ratio(fastest.step) == pytest.approx(np.exp(0.4307 * np.sqrt(2) * SPREAD), rel=1e-4)
    assert not find_ties([fastest, build(1.06, tp=8)], CORRELATION)[1]


def test_a_wider_band_is_an_error_of_all_layouts_that_have_it() -> None:
    layouts = [build(1.0), build(1.0, micro=2), build(1.0, sharding="fsdp", spread=0.2)]
    layouts.append(build(1.0, micro=2, sharding="fsdp", spread=0.2))
    covariance = build_error_covariance(layouts, CORRELATION)
    assert np.diag(covariance) == pytest.approx([0.08**2, 0.08**2, 0.2**2, 0.2**2])

    def spread_of_difference(one: int, other: int) -> float:
        return float(covariance[one, one] + covariance[other, other] - 2 * covariance[one, other])

    assert spread_of_difference(0, 1) == pytest.approx(spread_of_difference(2, 3))
    assert spread_of_difference(0, 2) > 3 * spread_of_difference(0, 1)


def test_chances_are_those_of_normal_errors() -> None:
    alike = estimate_chances([build(1.0, micro=1), build(1.0, micro=2)], CORRELATION)
    assert alike == pytest.approx([0.5, 0.5], abs=0.03)
    # One standard deviation of the difference: the normal distribution has 0.8413 below it.
    gap = float(np.exp(SPREAD * np.sqrt(2 * (1 - CORRELATION))))
    assert estimate_chances([build(1.0), build(gap, micro=2)], CORRELATION) == pytest.approx([0.841, 0.159], abs=0.02)
    assert estimate_chances([build(1.0), build(2.0, micro=2)], CORRELATION) == [1.0, 0.0]
    many = [build(1.0, micro=size) for size in (1, 2, 4, 8)]
    assert sum(estimate_chances(many, CORRELATION)) == pytest.approx(1.0)
    assert estimate_chances(many, CORRELATION) == estimate_chances(many, CORRELATION)


def test_the_start_is_the_fastest_unless_a_tie_is_better_in_kind() -> None:
    fsdp = build(1.0, sharding="fsdp", memory_gib=33)
    assert choose_start([fsdp, build(1.014)], CORRELATION) == 1  # one mechanism less
    assert choose_start([fsdp, build(1.05)], CORRELATION) == 0  # no tie
    assert choose_start([fsdp, build(1.025, tp=1, micro=8)], CORRELATION) == 0  # a tie that gives up more than 2 %
    assert choose_start([build(1.0, memory_gib=33), build(1.01, micro=2, memory_gib=30)], CORRELATION) == 0
    assert choose_start([build(1.0, memory_gib=33), build(1.01, micro=2, memory_gib=20)], CORRELATION) == 1
    tight = replace(build(1.0), standing=Standing(cautions=("memory: 37 of 38 GiB",)))
    assert choose_start([tight, build(1.01, tp=2)], CORRELATION) == 1
    assert choose_start([tight, build(1.03, tp=4)], CORRELATION) == 1  # without a caution, a tie may give up more
    assert choose_start([tight, build(1.06, tp=4)], CORRELATION) == 0  # no tie
    assert choose_start([tight, build(1.04, micro=2)], CORRELATION) == 1  # no tie, but it fits for sure
    other = replace(build(1.0), standing=Standing(cautions=("ep 256: at most 128 published",)))
    assert choose_start([other, build(1.04, micro=2)], CORRELATION) == 0  # other cautions count among ties only


def test_families_are_ranked_with_their_copies() -> None:
    found = [build(1.0, micro=4), build(1.01, micro=2), build(1.02, tp=2, micro=4), build(1.5, micro=1)]
    first, second = rank_families(found, 2, _identify_family, CORRELATION)
    assert (first.plan.micro_batch_size, first.standing.num_near_copies) == (4, 1)  # micro-batch 1 is too slow for one
    assert (second.plan.layout.tensor_model_parallel_size, second.standing.num_near_copies) == (2, 0)
    assert first.standing.chance_of_best + second.standing.chance_of_best == pytest.approx(1.0)
    assert first.standing.chance_of_best > 0.5
    assert [one.standing.is_tied for one in (first, second)] == [True, True]
    *_, third, fourth = rank_families(found, 4, _identify_family, CORRELATION)
    assert [third.plan.micro_batch_size, fourth.plan.micro_batch_size] == [2, 1]


def test_the_rule_costs_little_on_published_jobs() -> None:
    """The layout that it would start from, against the measured best of each job that ran in several layouts."""
    losses, chances = [], []
    for path in (PUBLISHED_RUNS_PATH, PUBLISHED_MOE_PATH):
        runs = read_runs(path)[0]
        for group in group_by_job(runs):
            rows = [(project(runs[one].plan), runs[one].step_time_s) for one in group]
            rows.sort(key=lambda row: row[0].step.total_s)
            projections = [projection for projection, _ in rows]
            fastest_s = min(measured_s for _, measured_s in rows)
            losses.append(rows[choose_start(projections, CORRELATION)][1] / fastest_s - 1)
            best = [measured_s for _, measured_s in rows].index(fastest_s)
            chances.append((estimate_chances(projections, CORRELATION)[best], 1 / len(rows)))
    assert len(losses) >= 40
    assert fmean(losses) < 0.03
    assert max(losses) < 0.11  # measured: 10.6 %, of 39.1B on 512 A100
    # The layout that was the fastest had a far better chance than one drawn at random.
    assert fmean(chance for chance, _ in chances) > 1.5 * fmean(random for _, random in chances)


def project(plan: Plan) -> Projection:
    memory = estimate_heaviest_plan_stage(plan)
    limit = round(0.95 * plan.gpu.memory_bytes)
    cautions = list_cautions(plan, memory.total_bytes, memory_limit_bytes=limit, memory_margin_ratio=0.07)
    return Projection(plan=plan, step=predict_step(plan), memory=memory, standing=Standing(cautions=cautions))


def test_a_family_of_a_wider_band_is_not_represented_by_what_is_no_tie() -> None:
    """0.43 * 0.2 * sqrt(2 * (1 - 0.75)) is 6 % among FSDP layouts alone; with the common band of 0.08 it is 2.4 %."""
    tight = replace(build(1.0, sharding="fsdp", spread=0.2), standing=Standing(cautions=("memory: tight",)))
    roomy = build(1.055, micro=2, sharding="fsdp", spread=0.2)
    found = [tight, build(1.01, tp=2), roomy]
    assert choose_start([tight, roomy], CORRELATION) == 1
    _, second = rank_families(found, 2, _identify_family, CORRELATION)
    assert second.plan == tight.plan
    assert second.standing.is_tied


def test_the_fastest_has_the_fewest_cautions() -> None:
    tight = replace(build(1.0), standing=Standing(cautions=("memory: tight",)))
    found = [tight, build(1.01, tp=2), build(1.02, tp=1, memory_gib=2)]
    assert choose_fastest(found, CORRELATION) == 1
    assert choose_fastest([tight], CORRELATION) == 0
