"""Measured rows are predicted with their own layout, or left out with the reason."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.report.overlay import build_overlay
from megatron_hammer.scaling.search.projection import Study
from tests.helpers.run_tables import write_table
from tests.helpers.toy_study import build_toy_study, predict

MODEL = select_preset("llama3-8b").model
CELLS = {
    "model": "Llama3-8B",
    "layers": str(MODEL.num_layers),
    "hidden": str(MODEL.hidden_size),
    "heads": str(MODEL.num_attention_heads),
    "kv_heads": str(MODEL.num_query_groups),
    "ffn": str(MODEL.ffn_hidden_size),
    "vocab": str(MODEL.vocab_size),
    "seq": "8192",
}


@pytest.fixture
def study() -> Study:
    return build_toy_study(
        "llama3-8b", gpu=select_gpu("h100-sxm"), cluster=select_cluster("aws-p5"), seq_length=8192, gpu_counts=(16,)
    )


def test_a_run_is_predicted_with_its_own_layout_on_the_studys_cluster(study: Study, tmp_path: Path) -> None:
    overlay = build_overlay(write_table(tmp_path / "runs.csv", CELLS), study, predict)
    (run,) = overlay.runs
    assert overlay.left_out == ()
    plan, layout = run.run.plan, run.run.plan.layout
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size)
    assert sizes == (2, 1, 8)
    assert (plan.cluster.name, plan.model) == ("aws-p5", study.model)
    assert (run.run.row_number, run.run.source, run.run.step_time_s) == (2, "team_a", 0.7)
    assert run.step == predict(plan)
    assert run.error_ratio == pytest.approx(run.step.total_s / 0.7 - 1)
    assert run.is_in_band == (run.step.low_s <= 0.7 <= run.step.high_s)


def test_rows_of_another_study_are_left_out(study: Study, tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "runs.csv", CELLS | {"layers": "16"}, CELLS, CELLS | {"gpu_type": "A100"}, CELLS | {"gpu_type": "X9"}
    )
    overlay = build_overlay(path, study, predict)
    assert [one.run.row_number for one in overlay.runs] == [3]
    assert [(row.row_number, row.reason) for row in overlay.left_out] == [
        (2, "it trained Llama3-8B, the projection is of llama3-8b"),
        (4, "it ran on a100-sxm-80gb, the projection is of h100-sxm"),
        (5, "its GPU 'X9' is not known; describe it with --gpus-file"),
    ]


def test_model_fields_that_change_no_work_do_not_prevent_a_match(study: Study, tmp_path: Path) -> None:
    model = replace(study.model, name="ours", rotary_base=10_000, norm_epsilon=1e-6, max_position_embeddings=131_072)
    overlay = build_overlay(write_table(tmp_path / "runs.csv", CELLS), replace(study, model=model), predict)
    assert [one.run.plan.model.name for one in overlay.runs] == ["ours"]


def test_runs_that_the_coefficients_were_fitted_on_are_marked(study: Study, tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", CELLS, CELLS | {"global_batch": "128"})
    first = read_runs(path)[0][0].fingerprint
    runs = build_overlay(path, study, predict, fitted_fingerprints={first}).runs
    assert [one.status for one in runs] == ["fitted", "predicted"]


def test_a_file_that_is_not_there(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none.csv"))):
        build_overlay(tmp_path / "none.csv", study, predict)
