"""Which machine is best, and when the errors of the predictions leave that open."""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.decisions.compare import (
    Amounts,
    Option,
    build_option,
    compare,
    correlate_errors,
    find_front,
    find_interval,
)
from megatron_hammer.scaling.plan import PARTS, Gpu, StepTime
from megatron_hammer.scaling.search.projection import SizeProjection
from tests.helpers.toy_study import GPU, build_toy_study, project_toy_study

OTHER_GENERATION = replace(GPU, name="toy-8bit", fp8_tflops=200.0)
COEFFICIENTS = replace(build_prior_coefficients(), layout_correlation=0.6)


def build(
    gpu: Gpu = GPU, *, num_gpus: int = 8, speed: float = 1.0, kgco2_per_kwh: float | None = None, **changes: Any
) -> Option:
    """An option of the toy machine, `speed` times as fast, with a band of +-20% as a logarithm."""
    study = build_toy_study(gpu=gpu, gpu_counts=(num_gpus,), num_best=1, **changes)
    size = project_toy_study(study).sizes[0]
    (best,) = size.projections
    parts = {name: getattr(best.step, name) / speed for name in PARTS}
    total_s = sum(parts.values())
    step = StepTime(**parts, low_s=total_s / math.exp(0.2), high_s=total_s * math.exp(0.2))
    return build_option(study, replace(size, projections=(replace(best, step=step),)), kgco2_per_kwh)


def nothing_fits() -> Option:
    size = SizeProjection(num_gpus=8, global_batch_size=32, num_candidates=3, projections=(), problem="gpus: too few")
    return build_option(build_toy_study(gpu_counts=(8,)), size, 0.5)


def test_co2_is_the_energy_times_the_grid() -> None:
    option = build(kgco2_per_kwh=0.4)
    assert option.amounts is not None
    assert option.bill is not None
    assert option.amounts.co2_tonnes == pytest.approx(option.bill.energy_mwh * 1000 * 0.4 / 1000)
    assert option.amounts.cost_usd is None


def test_a_clear_difference_has_no_tie() -> None:
    options = [build(), build(OTHER_GENERATION, speed=2.0), nothing_fits()]
    comparison = compare(options, COEFFICIENTS)
    (days,) = [one for one in comparison.verdicts if one.criterion == "days"]
    assert (days.best, days.ties, days.unknown) == (1, (), ())
    deviation = 0.2 / NormalDist().inv_cdf(0.9)
    better = NormalDist(0, math.sqrt(2) * deviation).cdf(math.log(2))
    # The standard error of a share of 20,000 draws is below 0.004.
    assert days.probabilities[1] == pytest.approx(better, abs=0.015)
    assert set(days.probabilities) == {0, 1}
    ratio, low, high = find_interval(comparison, 0, 1, "days")
    assert ratio == pytest.approx(2.0, rel=1e-3)
    assert math.log(high / low) == pytest.approx(2 * math.sqrt(2) * 0.2, rel=1e-4)


def test_what_the_errors_explain_is_a_tie_only_between_machines_that_do_not_share_them() -> None:
    # 15 % is within the errors of two generations, and beyond those of the same layout on the same machine.
    across = compare([build(), build(OTHER_GENERATION, speed=1.15)], COEFFICIENTS).verdicts[0]
    assert (across.best, across.ties) == (1, (0,))
    within = compare([build(), build(speed=1.15)], COEFFICIENTS).verdicts[0]
    assert (within.best, within.ties) == (1, ())
    assert within.probabilities[1] == 1.0


def test_errors_are_correlated_by_distance_within_a_generation() -> None:
    plans = [
        option.best.plan
        for option in (build(), build(num_gpus=16), build(OTHER_GENERATION), build(replace(GPU, name="toy-b")))
        if option.best is not None
    ]
    same = replace(plans[1], layout=replace(plans[0].layout, data_parallel_size=2 * plans[0].layout.data_parallel_size))
    plans[1] = replace(same, micro_batch_size=plans[0].micro_batch_size, recompute=plans[0].recompute)
    plans[1] = replace(plans[1], sharding=plans[0].sharding)
    plans[3] = replace(plans[0], gpu=plans[3].gpu, cluster=replace(plans[0].cluster, name="another"))
    correlations = correlate_errors(plans, 0.6)
    assert np.diag(correlations) == pytest.approx([1, 1, 1, 1])
    assert correlations[0, 1] == pytest.approx(0.6)  # twice the GPUs
    assert correlations[0, 2] == 0.0
    assert correlations[0, 3] == pytest.approx(0.6**2)  # another GPU and another cluster


def test_the_front_has_no_option_that_another_beats() -> None:
    def option(days: float, cost: float | None) -> Option:
        amounts = Amounts(days=days, cost_usd=cost, energy_mwh=1.0, co2_tonnes=None)
        return replace(build(), amounts=amounts)

    options = [option(5, 10), option(3, 12), option(4, 12), option(9, 8), option(9, 9), option(1, None), nothing_fits()]
    assert find_front(options, "cost_usd") == (1, 0, 3)


def test_without_prices_days_are_set_against_energy() -> None:
    assert compare([build(), build(num_gpus=16)], COEFFICIENTS).rival == "energy_mwh"
    comparison = compare([build(usd_per_gpu_hour=2.0), build(num_gpus=16)], COEFFICIENTS)
    assert comparison.rival == "cost_usd"
    (cost,) = [one for one in comparison.verdicts if one.criterion == "cost_usd"]
    assert (cost.best, cost.unknown) == (0, (1,))


def test_where_nothing_fits_there_is_no_verdict() -> None:
    comparison = compare([nothing_fits(), nothing_fits()], COEFFICIENTS)
    assert comparison.verdicts == ()
    assert comparison.front == ()
