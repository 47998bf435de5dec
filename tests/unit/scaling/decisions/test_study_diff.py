"""What differs between two projection files, and why a layout is in only one of them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients, replace_values
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.decisions.study_diff import StudyDifference, compare_studies
from megatron_hammer.scaling.decisions.study_diff_report import (
    build_document,
    build_tables,
    describe_difference,
    draw_curves,
    list_rows,
)
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.report.projection_file import build_projection_document, format_json
from megatron_hammer.scaling.report.saved_study import SavedStudy, read_study
from megatron_hammer.scaling.search.projection import StudyResult
from megatron_hammer.scaling.search.search import Search
from megatron_hammer.scaling.search.search_space import SearchSpace
from tests.helpers.toy_study import build_toy_study

SPACE = SearchSpace(micro_batch_sizes=(1, 2), context_parallel_sizes=(1,))
FIELDS: dict[str, Any] = {
    "gpu": select_gpu("a100-sxm-80gb"),
    "cluster": select_cluster("dgx-a100"),
    "gpu_counts": (8, 16),
    "global_batch_size": 64,
    "memory_limit_bytes": 76 * GIB,
    "space": SPACE,
}


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def build(name: str = "first", coefficients: Coefficients | None = None, **changes: Any) -> SavedStudy:
        coefficients = coefficients or load_coefficients()
        study = build_toy_study(**(FIELDS | changes))
        search = Search(predict=partial(predict_step, coefficients=coefficients))
        result = StudyResult(
            study=study,
            sizes=tuple(search.search_plans(study, count) for count in study.gpu_counts),
            knee=None,
            provenance={},
            coefficients=coefficients,
        )
        path = tmp_path / f"{name}.json"
        path.write_text(format_json(build_projection_document(result)), encoding="utf-8")
        return read_study(path)

    return build


def list_reasons(result: StudyDifference, status: str) -> set[str]:
    return {row["reason"] for row in list_rows(result) if row["status"] == status}


def test_a_study_does_not_differ_from_itself(save: Any) -> None:
    result = compare_studies(save(), save("second"))
    assert describe_difference(result) == ["The studies are the same."]
    assert build_document(result)["is_same"] is True
    assert build_tables(result) == []


def test_a_limit_of_memory_explains_what_vanished(save: Any) -> None:
    first = save()
    needs = [row.plan for row in first.projection.rows]
    assert needs
    result = compare_studies(first, save("second", memory_limit_bytes=12 * GIB))
    assert [one.name for one in result.inputs] == ["study.memory_limit_bytes"]
    assert (result.inputs[0].first, result.inputs[0].second) == (76 * GIB, 12 * GIB)
    assert result.vanished
    assert all("does not fit: " in one.reason and " GiB of 12.0" in one.reason for one in result.vanished)
    (change, _) = result.sizes
    assert (change.loss_ratio, change.kept_problem) == (None, result.vanished[0].reason)
    assert change.time_ratio is not None
    assert f"; the old one: {change.kept_problem}" in describe_difference(result)[1]
    # A study with more memory would have shown what is new in the other one, were it not slower.
    assert all(
        reason.startswith(("slower than the 3 rows", "another layout")) for reason in list_reasons(result, "appeared")
    )


def test_restrictions_and_sizes_explain_what_vanished(save: Any) -> None:
    space = replace(SPACE, tensor_model_parallel_sizes=(4,), recomputes=("full",))
    result = compare_studies(save(), save("second", gpu_counts=(8,), space=space))
    reasons = {one.row.num_gpus: one.reason for one in result.vanished}
    assert reasons[16] == "the study has no size of 16 GPUs"
    assert reasons[8].startswith("not allowed: --tensor-model-parallel-size 4, --recompute full")
    assert describe_difference(result)[-1] == "16 GPUs: only in the first study."
    assert draw_curves(result) is None  # the second study has a single size


def test_a_batch_explains_what_would_not_start(save: Any) -> None:
    result = compare_studies(save(gpu_counts=(16,)), save("second", gpu_counts=(16,), global_batch_size=4))
    assert any(reason.startswith("would not start with 4 samples") for reason in list_reasons(result, "vanished"))


def test_slower_coefficients_move_the_times_of_the_same_layouts(save: Any) -> None:
    own = load_coefficients()
    slower = replace_values(own, {"ampere.gemm_ratio": 0.5 * own.gpus["ampere"].gemm_ratio})
    result = compare_studies(save(), save("second", slower))
    assert [one.name for one in result.inputs] == ["cost_model.coefficients.gpu.ampere.gemm_ratio"]
    assert result.pairs
    assert all(0.3 < pair.time_ratio < 1.0 for pair in result.pairs)
    assert result.notes == ()
    same = [size for size in result.sizes if size.is_same_layout]
    assert [size.loss_ratio for size in same] == [0.0] * len(same)
    image = draw_curves(result)
    assert image is not None
    assert image.startswith(b"\x89PNG")


def test_a_file_of_another_model_is_noted(save: Any, tmp_path: Path) -> None:
    first = save()
    path = tmp_path / "other.json"
    document = json.loads(first.path.read_text())
    for row in document["rows"]:
        for name in ("step_time_s", "low_s", "high_s"):
            row["prediction"][name] *= 2
    path.write_text(json.dumps(document))
    result = compare_studies(first, read_study(path))
    (note,) = result.notes
    assert note.startswith(f"{path}: another version of the cost model wrote this file (row 8-1: ")
    assert result.pairs[0].time_ratio == pytest.approx(1.0)
    path.write_text(json.dumps(document | {"cost_model": None, "rows": document["rows"][:1]}))
    unknown = compare_studies(first, read_study(path))
    assert any(one.reason.startswith("unknown: the file does not have the coefficients") for one in unknown.vanished)
