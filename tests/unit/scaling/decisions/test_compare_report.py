"""Decisions in sentences: a tie is called one, and what is not known is said."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_hammer.scaling.decisions.compare import Comparison, Option, Verdict, build_option
from megatron_hammer.scaling.decisions.compare_report import (
    build_document,
    build_tables,
    describe_comparison,
    draw_front,
    format_probability,
)
from megatron_hammer.scaling.search.projection import SizeProjection
from tests.helpers.toy_study import build_toy_study, project_toy_study


def build(num_gpus: int, **changes: Any) -> Option:
    study = build_toy_study(gpu_counts=(num_gpus,), num_best=1, **changes)
    return build_option(study, project_toy_study(study).sizes[0], None)


OPTIONS = (build(8, usd_per_gpu_hour=2.0), build(4))
DAYS = Verdict(criterion="days", best=0, ties=(1,), probabilities={0: 0.7, 1: 0.3}, unknown=())
COST = Verdict(criterion="cost_usd", best=0, ties=(), probabilities={0: 1.0}, unknown=(1,))


def compare(*verdicts: Verdict, options: tuple[Option, ...] = OPTIONS) -> Comparison:
    return Comparison(
        options=options, verdicts=verdicts, rival="cost_usd", front=(0,), spreads=np.full((len(options),) * 2, 0.1)
    )


def test_a_tie_is_called_a_tie() -> None:
    days, cost, hint = describe_comparison(compare(DAYS, COST))
    assert days.startswith("Fastest: a tie. toy-gpu x 8 (toy-cluster) bf16, ")
    assert "is not ahead of toy-gpu x 4 (toy-cluster) bf16 (+" in days
    assert days.endswith(" Probability of being the best: 70%.")
    assert hint == "CO2: not counted. Pass --grid-kgco2-per-kwh."
    assert cost.startswith("Cheapest: toy-gpu x 8 (toy-cluster) bf16, ")
    assert cost.endswith(" USD. Not known for toy-gpu x 4 (toy-cluster) bf16.")
    assert build_document(compare(DAYS, COST))["verdicts"][0]["is_tie"] is True


def test_ties_and_intervals_stand_in_the_table() -> None:
    _, ratios = build_tables(compare(DAYS, COST))
    first, second = ratios.groups[0]
    assert first[1:4] == ("1.00", "best", "70%")
    assert second[2].endswith(" tie")
    assert second[4:] == ("", "", "")  # a cost that is not known


def test_an_option_that_does_not_fit_is_named_with_its_reason() -> None:
    size = SizeProjection(num_gpus=2, global_batch_size=32, num_candidates=1, projections=(), problem="gpus: too few.")
    absent = build_option(build_toy_study(gpu_counts=(2,)), size, None)
    comparison = compare(replace(DAYS, ties=(), probabilities={0: 1.0}), options=(*OPTIONS[:1], absent))
    assert describe_comparison(comparison)[-1] == "toy-gpu x 2 (toy-cluster) bf16: gpus: too few."
    assert len(build_tables(comparison)) == 1  # nothing to compare with
    assert draw_front(comparison) is None  # one point


@pytest.mark.parametrize(("share", "text"), [(1.0, "above 99%"), (0.0, "below 1%"), (0.456, "46%")])
def test_no_probability_is_certain(share: float, text: str) -> None:
    assert format_probability(share) == text
