"""The command: a table and the flags to pass, JSON alone on stdout, and values that cannot be meant."""

import json
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study.main import main
from megatron_hammer.scaling.report.projection_file import build_projection_document, format_json
from tests.helpers.toy_study import build_toy_study, project_toy_study


@pytest.fixture(scope="module")
def projection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "projection.json"
    study = build_toy_study("hammer-tiny-moe", seq_length=256, usd_per_gpu_hour=2.0, gpu_counts=(4, 8))
    path.write_text(format_json(build_projection_document(project_toy_study(study))), encoding="utf-8")
    return path


def test_the_table_ends_in_flags_assumptions_and_counts(projection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["goodput", "--projection", str(projection), "--storage-gb-per-s", "0.5", "--async-save"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Goodput with failures" or lines[0].strip() == "Goodput with failures"
    assert any("row 8-1: pass --save-interval " in line and "--async-save" in line for line in lines)
    assert any(line.startswith("Storage: 0.5 GB/s") for line in lines)
    assert lines[-1].endswith("0 without progress")


def test_json_is_alone_on_stdout_and_is_the_file(
    projection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--projection", str(projection), "--rows", "8-2", "--failures-per-1000-gpu-days", "2"]
    main(["goodput", *flags, "--json", "--output-dir", str(tmp_path)])
    text = capsys.readouterr().out
    (row,) = json.loads(text)["rows"]
    assert row["id"] == "8-2"
    assert row["mtbf_s"] == pytest.approx(86_400 * 1000 / 2 / 8)
    assert row["cost_usd"] == pytest.approx(row["days"] * 24 * 8 * 2.0)
    assert json.loads(text)["failure_sources"] == {}
    assert (tmp_path / "goodput.json").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "flags, field",
    [
        (("--storage-gb-per-s", "0"), "storage-gb-per-s: must be between 0.001 and 1e+06, got 0"),
        (("--storage-gb-per-s", "1e9"), "storage-gb-per-s: must be between 0.001 and 1e+06, got 1e+09"),
        (("--detection-s", "-1"), "detection-s: must be between 0 and 1e+06, got -1"),
        (("--failures-per-1000-gpu-days", "1e-300"), "failures-per-1000-gpu-days: must be between 1e-06 and"),
        (("--failures-per-1000-gpu-days", "nan"), "command line: argument --failures-per-1000-gpu-days"),
        (("--failures-per-1000-gpu-days", "1000000"), "row 4-1: a step, a save and a restart must fit"),
        (("--rows", "5-1"), "row='5-1'"),
    ],
)
def test_values_that_cannot_be_meant(
    projection: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], field: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["goodput", "--projection", str(projection), *flags])
    assert stop.value.code == 2
    assert field in capsys.readouterr().err
