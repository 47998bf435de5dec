"""The tables of a projection in the terminal."""

import io
from dataclasses import replace
from fractions import Fraction

import pytest

from megatron_hammer.files.tables import PLAIN_WIDTH
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.evidence.validation import Prediction
from megatron_hammer.scaling.plan import PARTS
from megatron_hammer.scaling.published.measured_runs import UnpredictableRow
from megatron_hammer.scaling.report.projection_tables import (
    SHARES,
    build_tables,
    describe_experts,
    describe_knee,
    describe_result,
    describe_stages,
    describe_study,
    format_amount,
    format_tokens,
    print_tables,
)
from megatron_hammer.scaling.search.projection import Overlay, StudyResult, describe_cuts
from megatron_hammer.scaling.search.search_space import SearchSpace
from tests.helpers.toy_study import build_measured_run, build_toy_study, project_toy_study


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return project_toy_study(build_toy_study(gpu_counts=(4, 13, 8), usd_per_gpu_hour=2.5))


def show(result: StudyResult) -> str:
    stream = io.StringIO()
    print_tables(result, stream)
    return stream.getvalue()


def test_the_terminal_has_every_table_and_problem(result: StudyResult) -> None:
    text = show(result)
    assert text.startswith(
        "hammer-1b4 on toy-gpu (toy-cluster): strong scaling, 32 samples per step, sequence 2,048, bf16"
    )
    for title in (
        "The layout to start from at each size",
        "Layouts, the one to start from first, then the fastest",
        "Where its time goes",
        "Memory of its heaviest stage, GiB per GPU",
        "Training on 10B tokens",
        "At 2.5 USD per GPU-hour.",
        "gpus: hammer-1b4 must divide over them, got gpus=13",
        "Knee: not reached at 8 GPUs",
    ):
        assert title in text
    assert max(len(line) for line in text.splitlines()) <= PLAIN_WIDTH


def test_what_waits_on_the_host_is_a_column() -> None:
    space = SearchSpace(optimizer_offload_ratio=1.0, shardings=("distributed_optimizer",))
    moved = project_toy_study(build_toy_study(gpu_counts=(4,), space=space))
    memory = next(table for table in build_tables(moved) if table.title.startswith("Memory"))
    best = moved.sizes[0].best
    assert best is not None
    assert (memory.columns[-1], memory.groups[0][0][-1]) == ("on host", f"{best.memory.host_bytes / GIB:.1f}")
    assert best.memory.host_bytes > 0


def test_rows_say_what_was_projected(result: StudyResult) -> None:
    speed, layouts, shares, memory, bill = build_tables(result)
    best = result.sizes[0].best
    assert best is not None
    assert speed.groups[0][0][0] == "4"
    assert speed.groups[0][0][1] == f"{best.step.total_s:.3f}"
    assert speed.groups[0][0][6] == "100.0%"
    assert [[row[0] for row in group] for group in layouts.groups] == [["4-1", "4-2", "4-3"], [], ["8-1", "8-2", "8-3"]]
    assert sum(float(cell.rstrip("%")) for cell in shares.groups[0][0][1:]) == pytest.approx(100, abs=0.5)
    parts = [float(cell) for cell in memory.groups[0][0][2:-1]]
    assert sum(parts) == pytest.approx(float(memory.groups[0][0][-1]), abs=0.5)
    assert bill.columns[-1] == "USD"
    assert all(
        len(row) == len(table.columns) for table in build_tables(result) for group in table.groups for row in group
    )


def test_the_breakdown_leaves_out_no_part() -> None:
    assert sorted(part for parts in SHARES.values() for part in parts) == sorted(PARTS)


def test_without_a_price_there_is_no_cost() -> None:
    bill = build_tables(project_toy_study(build_toy_study(gpu_counts=(4,))))[-1]
    assert bill.note == "No price is known: pass --usd-per-gpu-hour."
    assert "USD" not in bill.columns
    without_budget = build_tables(project_toy_study(build_toy_study(gpu_counts=(4,), train_tokens=None)))
    assert [table.title for table in without_budget][-1] == "Memory of its heaviest stage, GiB per GPU"


def test_where_nothing_fits_there_are_only_reasons() -> None:
    nothing = project_toy_study(build_toy_study(memory_limit_bytes=2**30, gpu_counts=(2,)))
    assert build_tables(nothing) == []
    text = show(nothing)
    assert "got" in text
    assert text.endswith("Knee: none, as nothing fits at any size.\n")


def test_measured_runs_and_what_was_left_out(result: StudyResult) -> None:
    best = result.sizes[0].best
    assert best is not None
    measured = build_measured_run(best.plan, 0.8 * best.step.total_s)
    run = Prediction(run=measured, step=best.step, status="predicted")
    left_out = UnpredictableRow(row_number=3, source="team", model="x", reason="its GPU 'X' is not known")
    short = replace(measured, plan=replace(best.plan, seq_length=512))
    fitted = Prediction(run=short, step=best.step, status="fitted")
    tables = build_tables(replace(result, overlay=Overlay(runs=(run, fitted), left_out=(left_out,))))
    assert [row[-2:] for row in tables[-2].groups[0]] == [("+25.0%", "out"), ("+25.0%*", "out")]
    assert [row[4] for row in tables[-2].groups[0]] == ["bf16", "bf16 s=512"]
    assert tables[-1].groups[0] == (("3", "team", "its GPU 'X' is not known"),)


def test_sentences(result: StudyResult) -> None:
    assert describe_result(result) == (
        f"3 sizes, 2 feasible; {sum(size.num_candidates for size in result.sizes):,} candidates, 6 layouts shown"
    )
    weak = replace(result, study=replace(result.study, global_batch_size=None, samples_per_gpu=Fraction(1, 2)))
    assert "weak scaling, 0.5 samples per GPU" in describe_study(weak)
    assert result.knee is not None
    beyond = replace(result, knee=replace(result.knee, num_gpus=4, num_gpus_beyond=8))
    assert describe_knee(beyond) == "Knee: 4 GPUs; 8 do not keep 80% of the best speed per GPU at a smaller size."


def test_uneven_stages_are_shown(result: StudyResult) -> None:
    best = result.sizes[0].best
    assert best is not None
    for changes, words in (
        ({"accounts_for_embedding": True, "accounts_for_loss": True}, "4+EL"),
        ({"accounts_for_loss": True}, "4+L"),
        ({"num_layers_first_stage": 5, "num_layers_last_stage": 3}, "4 (5..3)"),
        ({}, "4"),
    ):
        layout = replace(best.plan.layout, pipeline_model_parallel_size=4, **changes)
        assert describe_stages(replace(best, plan=replace(best.plan, layout=layout))) == words


def test_experts_cut_otherwise_than_the_rest_are_shown() -> None:
    result = project_toy_study(build_toy_study("hammer-tiny-moe", seq_length=256, gpu_counts=(4,)))
    best = result.sizes[0].best
    assert best is not None
    for tp, ep, etp, words in ((2, 4, 1, "4 etp1"), (2, 4, 2, "4"), (1, 2, 1, "2")):
        layout = replace(
            best.plan.layout,
            tensor_model_parallel_size=tp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        assert describe_experts(replace(best, plan=replace(best.plan, layout=layout))) == words


def test_the_other_way_of_scaling_is_a_table(result: StudyResult) -> None:
    weak = replace(result.study, global_batch_size=None, samples_per_gpu=Fraction(2), num_best=1)
    companion = project_toy_study(weak)
    table = build_tables(replace(result, companion=companion))[-1]
    assert table.title == "For comparison: weak scaling, 2 samples per GPU"
    assert [row[:2] for row in table.groups[0]] == [("4", "8"), ("13", "26"), ("8", "16")]
    best = companion.sizes[0].best
    assert best is not None
    assert table.groups[0][0][-1] == describe_cuts(best.plan)


@pytest.mark.parametrize(
    ("amount", "words"),
    [(0, "0"), (0.01234, "0.0123"), (4.567, "4.57"), (38.21, "38.2"), (999.4, "999"), (12345.6, "12,346")],
)
def test_amounts(amount: float, words: str) -> None:
    assert format_amount(amount) == words


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(15 * 10**12, "15T"), (2_097_152_000_000, "2,097,152,000,000"), (250 * 10**6, "250,000,000"), (10**9, "1B")],
)
def test_token_counts_are_printed_in_full(tokens: int, words: str) -> None:
    assert format_tokens(tokens) == words
