"""Plans are read back from a projection file, and other files are refused."""

import csv
import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import list_tables, load_coefficients, replace_values
from megatron_hammer.scaling.evidence.validation import Prediction
from megatron_hammer.scaling.published.measured_runs import UnpredictableRow
from megatron_hammer.scaling.report.projection_file import (
    build_projection_document,
    format_csv,
    format_json,
    read_projection,
)
from megatron_hammer.scaling.search.projection import Overlay, StudyResult
from tests.helpers.messages import raises_problem
from tests.helpers.toy_study import build_measured_run, build_toy_study, project_toy_study


@pytest.fixture(scope="module")
def result() -> StudyResult:
    study = build_toy_study("hammer-tiny-moe", seq_length=256, usd_per_gpu_hour=2.0, gpu_counts=(4, 7, 8))
    companion = project_toy_study(
        replace(study, global_batch_size=None, samples_per_gpu=Fraction(4), gpu_counts=(8,), num_best=1)
    )
    return project_toy_study(study, companion=companion)


def write(result: StudyResult, path: Path) -> Path:
    path.write_text(format_json(build_projection_document(result)), encoding="utf-8")
    return path


def test_plans_are_read_back_whole(result: StudyResult, tmp_path: Path) -> None:
    saved = read_projection(write(result, tmp_path / "projection.json"))
    assert saved.train_tokens == 10**10
    written = [projection for size in result.sizes for projection in size.projections]
    assert [row.plan for row in saved.rows] == [projection.plan for projection in written]
    assert [row.step_time_s for row in saved.rows] == [projection.step.total_s for projection in written]
    row = saved.select_row("8-2")
    assert (row.num_gpus, row.rank) == (8, 2)
    assert row.low_s < row.step_time_s < row.high_s


def test_the_coefficients_are_read_back_with_all_digits(result: StudyResult, tmp_path: Path) -> None:
    coefficients = replace_values(load_coefficients(), {"host_s": 1.23456789e-5})
    path = write(replace(result, coefficients=coefficients), tmp_path / "projection.json")
    read = read_projection(path).coefficients
    assert read is not None
    assert list_tables(read) == list_tables(coefficients)
    assert read_projection(write(result, path)).coefficients is None
    tables = list_tables(coefficients)
    tables["shared"]["unknown_ratio"] = 1.0
    path.write_text(json.dumps(build_projection_document(result) | {"cost_model": {"coefficients": tables}}))
    with pytest.raises(ConfigError, match=r"cost_model\.coefficients: .*unknown_ratio"):
        read_projection(path)


def test_rows_by_their_ids_once_each_else_the_first_of_each_size(result: StudyResult, tmp_path: Path) -> None:
    saved = read_projection(write(result, tmp_path / "projection.json"))
    assert [row.row_id for row in saved.select_rows("8-2,4-1,8-2")] == ["8-2", "4-1"]
    assert [row.row_id for row in saved.select_rows(None)] == ["4-1", "8-1"]
    for ids in ("", ","):
        with raises_problem(ConfigError, f"rows: must name a row, got '{ids}'"):
            saved.select_rows(ids)
    with pytest.raises(ConfigError, match="row='8-7'"):
        saved.select_rows("8-1,8-7")
    with pytest.raises(ConfigError, match=r"projection\.json: must hold a row, got none"):
        replace(saved, rows=()).select_rows(None)


def test_the_same_study_gives_the_same_bytes(result: StudyResult) -> None:
    again = project_toy_study(result.study)
    assert format_csv(again) == format_csv(result)
    assert format_json(build_projection_document(again)) == format_json(
        build_projection_document(replace(result, companion=None))
    )


def test_the_fields_of_the_file(result: StudyResult) -> None:
    document = json.loads(format_json(build_projection_document(result)))
    assert document["study"]["batch"] == {"global_batch_size": 32, "samples_per_gpu": None}
    assert [size["is_feasible"] for size in document["sizes"]] == [True, False, True]
    assert document["sizes"][1]["problem"].startswith("gpus: hammer-tiny-moe must divide over them, got gpus=7")
    assert document["sizes"][2]["best_row"] == "8-1"
    row = document["rows"][0]
    assert row["id"] == "4-1"
    assert sum(row["prediction"]["parts_s"].values()) == pytest.approx(row["prediction"]["step_time_s"])
    others = ("total_bytes", "host_bytes")
    parts = {name: size for name, size in row["memory"].items() if name.endswith("_bytes") and name not in others}
    assert sum(parts.values()) == row["memory"]["total_bytes"]
    assert row["prediction"]["mfu_convention"] == "A"
    assert row["prediction"]["cost_usd"] == pytest.approx(2.0 * row["prediction"]["gpu_hours"])
    assert document["companion"]["batch"] == {"global_batch_size": None, "samples_per_gpu": 4.0}
    assert document["companion"]["rows"][0]["id"] is None
    assert document["overlay"] is None


def test_without_a_budget_there_is_no_bill() -> None:
    document = build_projection_document(project_toy_study(build_toy_study(train_tokens=None, gpu_counts=(4,))))
    prediction = document["rows"][0]["prediction"]
    assert [prediction[name] for name in ("days", "energy_mwh", "cost_usd")] == [None, None, None]


def test_long_lists_of_the_provenance_are_counted(result: StudyResult) -> None:
    provenance = {"fingerprints": [str(number) for number in range(30)], "by": {"source": [1.0, 2.0]}}
    document = build_projection_document(replace(result, provenance=provenance))
    assert document["coefficients"] == {"fingerprints": {"num_entries": 30}, "by": {"source": [1.0, 2.0]}}


def test_measured_runs_are_kept_with_their_errors(result: StudyResult) -> None:
    best = result.sizes[0].best
    assert best is not None
    measured = build_measured_run(best.plan, 2 * best.step.total_s)
    run = Prediction(run=measured, step=best.step, status="predicted")
    left_out = UnpredictableRow(row_number=3, source="team", model="x", reason="it ran on another GPU")
    document = build_projection_document(replace(result, overlay=Overlay(runs=(run,), left_out=(left_out,))))
    assert document["overlay"]["runs"][0]["error_ratio"] == -0.5
    assert document["overlay"]["runs"][0]["is_in_band"] is False
    assert document["overlay"]["left_out"] == [{"row_number": 3, "source": "team", "reason": "it ran on another GPU"}]


def test_csv_has_one_line_per_layout(result: StudyResult) -> None:
    rows = list(csv.DictReader(io.StringIO(format_csv(result))))
    assert [row["id"] for row in rows] == ["4-1", "4-2", "4-3", "8-1", "8-2", "8-3"]
    best = result.sizes[0].best
    assert best is not None
    assert float(rows[0]["step_time_s"]) == best.step.total_s
    assert float(rows[0]["parts_s.matmul_s"]) == best.step.matmul_s
    assert int(rows[0]["memory.total_bytes"]) == best.memory.total_bytes
    assert int(rows[0]["tensor_model_parallel_size"]) == best.plan.layout.tensor_model_parallel_size


def test_an_unknown_row_is_refused(result: StudyResult, tmp_path: Path) -> None:
    path = write(result, tmp_path / "projection.json")
    with raises_problem(ConfigError, f"{path}:", "got row='9-1'", "4-1, 4-2, 4-3, 8-1, 8-2, 8-3"):
        read_projection(path).select_row("9-1")


HEADER = '"format": "megatron_hammer.scaling.projection", "format_version"'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, r"projection\.json: file cannot be read \(No such file.*Check the path"),
        ("{", r"content must be JSON, got: .*Pass projection\.json"),
        ("[]", r"content must be .*got \[\]\. Pass projection\.json"),
        ("{}", r"format must be given, got nothing\. Pass projection\.json"),
        (f"{{{HEADER}: 9}}", r"format_version must be 1, got 9\. Pass projection\.json"),
        (f"{{{HEADER}: 1}}", r"study must be given, got nothing\. Write it again"),
    ],
)
def test_files_that_are_no_projection(text: str | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "projection.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_projection(path)


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("rows", 0, "layout", "sequence_pipeline_size"), 2, r"row 4-1: layout\.sequence_pipeline_size .* known field"),
        (("rows", 0, "plan", "recompute"), "some", r"row 4-1: recompute must be .*got 'some'"),
        (("rows", 0, "prediction", "low_s"), "1", r"rows\[0\]\.prediction\.low_s must be a number, got '1'"),
        (("rows", 0, "prediction", "low_s"), 99.0, r"row 4-1: step_time_s must be within its band"),
        (("rows", 0, "id"), "4-2", r"row 4-2: id must be 4-1"),
        (("study", "gpu", "num_chips"), 2, r"study: gpu\.num_chips must be a known field, got 2"),
        (("study", "model", "num_layers"), None, r"study: model\.num_layers must be a whole number, got None"),
    ],
)
def test_fields_that_do_not_fit_are_named(
    keys: tuple[str | int, ...], value: Any, match: str, result: StudyResult, tmp_path: Path
) -> None:
    document: dict[str, Any] = build_projection_document(result)
    inner: Any = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path = tmp_path / "projection.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=match) as raised:
        read_projection(path)
    assert len(raised.value.problems) == 1
