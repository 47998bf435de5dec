"""Errors are those of runs that the coefficients have not seen; layouts are ranked among runs of one job."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.cli.scaling_study import validate as command
from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.coefficients import Coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence import calibration
from megatron_hammer.scaling.evidence.validation import (
    Prediction,
    build_validation_report,
    compute_error_figures,
    cross_validate_runs,
    list_fitted_fingerprints,
    validate_runs,
)
from megatron_hammer.scaling.evidence.validation_report import FITTED_SENTENCE, list_rows
from megatron_hammer.scaling.plan import StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from tests.helpers.run_tables import write_table


def read(path: Path, *rows: dict[str, str]) -> list[MeasuredRun]:
    runs, unpredictable = read_runs(write_table(path, *rows))
    assert unpredictable == []
    return runs


def predict(run: MeasuredRun, total_s: float, band_ratio: float = 0.1, **cells: Any) -> Prediction:
    """A prediction that says total_s, its band that ratio to either side."""
    step = predict_step(run.plan)
    scaled = {name: getattr(step, name) * total_s / step.total_s for name in STEP_FIELDS}
    band = {"low_s": total_s * (1 - band_ratio), "high_s": total_s * (1 + band_ratio)}
    return Prediction(run=run, step=replace(step, **scaled | band), **({"status": "predicted"} | cells))


STEP_FIELDS = [name for name in StepTime.__dataclass_fields__ if name not in ("low_s", "high_s")]


def unseen() -> Coefficients:
    return replace(load_coefficients(), provenance={})


def test_figures_by_hand(tmp_path: Path) -> None:
    runs = read(tmp_path / "runs.csv", *({"iteration_time_s": text} for text in ("1", "2", "4")))
    predictions = [predict(runs[0], 1.2), predict(runs[1], 1.9), predict(runs[2], 4.04)]
    figures = compute_error_figures(predictions)
    assert figures.num_rows == 3
    assert figures.median_absolute_ratio == pytest.approx(0.05)
    assert figures.mean_absolute_ratio == pytest.approx((0.2 + 0.05 + 0.01) / 3)
    assert figures.bias_ratio == pytest.approx(0.01)
    assert figures.band_coverage_ratio == pytest.approx(2 / 3)


def test_fitted_rows_are_in_no_figure(tmp_path: Path) -> None:
    runs = read(tmp_path / "runs.csv", {}, {"source": "team_b", "iteration_time_s": "0.9"})
    known = replace(unseen(), provenance={"sources": {"team_a": [runs[0].fingerprint]}})
    assert list_fitted_fingerprints(known) == {runs[0].fingerprint}
    report = validate_runs(runs, [], known)
    assert [one.status for one in report.predictions] == ["fitted", "predicted"]
    assert set(report.errors["source"]) == {"team_b"}
    assert report.errors["all"]["all rows"].num_rows == 1
    first, second = list_rows(report)
    assert first["error_ratio"] is None
    assert first["is_in_band"] is None
    assert first["predicted_s"] > 0
    expected = predict_step(runs[1].plan, known).total_s / 0.9 - 1
    assert second["error_ratio"] == pytest.approx(expected)


def test_figures_by_each_dimension(tmp_path: Path) -> None:
    runs = read(
        tmp_path / "runs.csv",
        {"gpu_type": "A100", "gpus": "8", "dp": "4"},
        {"precision": "fp8"},
        {"source": "MosaicML_x", "gpus": "1024", "dp": "512", "global_batch": "1024"},
    )
    errors = validate_runs(runs, [], unseen()).errors
    assert set(errors["GPU"]) == {"a100-sxm-80gb", "h100-sxm"}
    assert set(errors["precision"]) == {"bf16", "fp8"}
    assert list(errors["scale"]) == ["1-8 GPUs", "9-64 GPUs", "over 512 GPUs"]
    assert {name: figures.num_rows for name, figures in errors["software"].items()} == {
        "Megatron-style": 2,
        "other software": 1,
    }


def test_fitted_runs_are_not_ranked(tmp_path: Path) -> None:
    slow = {"tp": "1", "dp": "16", "iteration_time_s": "0.9"}
    runs = read(tmp_path / "runs.csv", {"iteration_time_s": "0.7"}, slow)
    predictions = [predict(run, time) for run, time in zip(runs, (0.8, 0.7), strict=True)]
    (ranking,) = build_validation_report(predictions, []).rankings
    assert (ranking.predicted_best.row_number, ranking.measured_best.row_number) == (3, 2)
    fitted = [replace(one, status="fitted") for one in predictions]
    assert build_validation_report(fitted, []).rankings == ()


def test_no_run_is_predicted_by_coefficients_of_its_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = ("team_a_v1.0", "team_a_v2.0", "lab_b", "MosaicML_x")
    cells = [{"source": name, "iteration_time_s": f"0.{position + 5}"} for position, name in enumerate(sources)]
    runs = read(tmp_path / "runs.csv", *cells)
    seen: list[list[str]] = []

    def fit(others: list[MeasuredRun], start: Coefficients, *, is_prior_start: bool) -> Coefficients:
        assert not is_prior_start
        seen.append([other.source for other in others])
        return replace(start, step_s=start.step_s * (1 + len(seen)))

    monkeypatch.setattr(calibration, "fit", fit)
    announced: list[str] = []
    report = cross_validate_runs(runs, [], announced.append, by="publication")
    assert seen == [["lab_b"], ["team_a_v1.0", "team_a_v2.0"], ["team_a_v1.0", "team_a_v2.0", "lab_b"]]
    assert announced[0] == "fitting to 1 runs, team_a left out"
    assert announced[2] == "fitting to 3 runs"
    assert [one.status for one in report.predictions] == ["cross-validated"] * 4
    times = [one.step.total_s for one in report.predictions]
    assert times[0] == times[1]  # one fit for both tables of the publication
    assert len(set(times)) == 3
    assert report.errors["all"]["all rows"].num_rows == 4


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(words))
    return capsys.readouterr().out


def test_the_command_prints_every_row_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "runs.csv", {}, {"seq": ""}, {"tp": "4", "dp": "4"})
    text = run_command(capsys, "--runs", str(path))
    assert "seq is blank and its source's sequence length is not known" in text
    assert "Errors by GPU" in text
    assert "Ranking of layouts" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("3 rows: 2 predicted, 0 fitted, 1 unpredictable; 2 of Megatron-style: median error ")
    assert FITTED_SENTENCE not in text


def test_the_command_refuses_accuracy_on_fitted_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path / "runs.csv", {})
    runs, _ = read_runs(path)
    known = replace(unseen(), provenance={"fingerprints": [runs[0].fingerprint]})
    monkeypatch.setattr(command, "load_coefficients", lambda path: known)
    text = run_command(capsys, "--runs", str(path), "--output-dir", str(tmp_path / "out"))
    assert "No accuracy is quoted on fitted rows" in text
    assert text.strip().splitlines()[-1] == "1 rows: 0 predicted, 1 fitted, 0 unpredictable"
    assert "Errors" not in text
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["validation.csv", "validation.json"]


def test_arguments_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"cross-validate: needs runs, got --memory alone\. Pass --runs as well"):
        run_command(capsys, "--cross-validate", "--memory", str(tmp_path / "memory.csv"))
    path = write_table(tmp_path / "runs.csv", {})
    words = ("--runs", str(path), "--cross-validate", "--coefficients", "mine.toml")
    with pytest.raises(ConfigError, match=r"fits its own coefficients, got --coefficients mine\.toml"):
        run_command(capsys, *words)


def test_the_published_tables_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(capsys).splitlines()[-1].startswith("495 rows: 210 predicted, 267 fitted, 18 unpredictable; ")
    lines = run_command(capsys, "--memory").splitlines()
    assert lines[-1] == "165 rows: 114 predicted, 51 not, each with its reason."
    assert not any("predicted, 267 fitted" in line for line in lines)


def test_refused_rows_are_counted_beside_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {"iteration_time_s": "0.5", "source": "lab"}
    path = write_table(
        tmp_path / "runs.csv", cells, cells | {"layers": ""}, cells | {"hidden": "", "source": "MosaicML_x"}
    )
    report = validate_runs(*read_runs(path), load_coefficients())
    assert report.refused["all"] == {"all rows": 2}
    assert report.refused["source"] == {"lab": 1, "MosaicML_x": 1}
    assert report.refused["software"] == {"Megatron-style": 1, "other software": 1}
    lines = [line.split() for line in run_command(capsys, "--runs", str(path)).splitlines()]
    assert ["lab", "1", "1"] in [line[:3] for line in lines]
    assert ["MosaicML_x", "0", "1", "-", "-", "-", "-"] in lines
