"""Published runs beside a projection: in the tables, in JSON and in CSV."""

import csv
import io
from dataclasses import replace

import pytest

from megatron_hammer.scaling.report.projection_file import build_projection_document, format_csv
from megatron_hammer.scaling.report.projection_tables import build_tables
from megatron_hammer.scaling.search.projection import Reference, StudyResult, describe_plan
from tests.helpers.toy_study import build_measured_run, build_toy_study, predict, project_toy_study


@pytest.fixture(scope="module")
def result() -> StudyResult:
    result = project_toy_study(build_toy_study(gpu_counts=(4, 8)))
    best, other = (size.projections[0] for size in result.sizes)
    run = build_measured_run(other.plan, 0.8 * other.step.total_s, row_number=17)
    step = predict(other.plan)
    slower = replace(best, step=replace(best.step, matmul_s=best.step.matmul_s + 0.1 * best.step.total_s))
    references = (
        Reference(num_gpus=4, run=run, step=step, projection=slower),
        Reference(num_gpus=8, run=run, step=step, projection=None),
    )
    return replace(result, references=references)


def test_the_table_has_the_measured_and_the_predicted_time(result: StudyResult) -> None:
    (table,) = [table for table in build_tables(result) if table.title.startswith("NVIDIA's published runs")]
    small, large = table.groups[0]
    assert len(small) == len(large) == len(table.columns)
    run = result.references[0].run
    assert small[:4] == ("4", "17 team", describe_plan(run.plan), "8 toy-gpu")
    assert small[6:9] == (f"{run.step_time_s:.3f}", f"{result.references[0].step.total_s:.3f}", "+25.0%")
    assert small[-1] == "+10.0%"
    assert large[-3:] == ("", "", "")


def test_without_references_there_is_no_table(result: StudyResult) -> None:
    titles = [table.title for table in build_tables(replace(result, references=()))]
    assert not any("published" in title for title in titles)


def test_the_files_have_them(result: StudyResult) -> None:
    small, large = build_projection_document(result)["references"]
    assert small["error_ratio"] == pytest.approx(0.25)
    assert (small["at_gpus"], small["gpus"], small["row_number"]) == (4, 8, 17)
    assert small["here"]["memory_bytes"] > 0
    assert large["here"] is None
    rows = list(csv.DictReader(io.StringIO(format_csv(result))))
    *layouts, first, second = rows
    assert {row["measured_step_time_s"] for row in layouts} == {""}
    assert [row["id"] for row in (first, second)] == ["4-published", "8-published"]
    assert float(first["measured_step_time_s"]) == pytest.approx(float(first["step_time_s"]) / 1.25)
    assert first["tensor_model_parallel_size"] == str(result.references[0].run.plan.layout.tensor_model_parallel_size)


def test_rows_have_their_standing(result: StudyResult) -> None:
    best = result.sizes[0].projections[0]
    cautions = ("memory: 37.0 of 38.0 GiB", "pp 64: at most 35")
    first = replace(best, standing=replace(best.standing, cautions=cautions))
    size = replace(result.sizes[0], projections=(first, *result.sizes[0].projections[1:]))
    result = replace(result, sizes=(size, *result.sizes[1:]))
    row = build_projection_document(result)["rows"][0]
    assert row["standing"]["cautions"] == cautions
    assert 0 < row["standing"]["chance_of_best"] <= 1
    cells = next(csv.DictReader(io.StringIO(format_csv(result))))
    assert cells["standing.cautions"] == "memory: 37.0 of 38.0 GiB; pp 64: at most 35"
    layouts = build_tables(result)[1]
    assert layouts.groups[0][0][-1] == "memory: 37.0 of 38.0 GiB; pp 64: at most 35"
    assert layouts.groups[0][0][-4].endswith("%")
