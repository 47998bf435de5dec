"""The command: a row of a projection becomes a trace; a file that this version would not have written is refused."""

import json
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, OutputError
from tests.helpers.study_commands import run_study, write_projection


@pytest.fixture(scope="module")
def projection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("--preset", "hammer-tiny", "--gpu", "a100-sxm-80gb", "--gpus", "4", "--pipeline-model-parallel-size", "4")
    return write_projection(tmp_path_factory.mktemp("study") / "projection.json", *flags, "--top", "2")


def test_the_summary_adds_up_to_the_step(projection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "traces" / "step.json"
    flags = ("--projection", str(projection), "--row", "4-2", "--output", str(output))
    run_study("trace", *flags, "--json")
    summary = json.loads(capsys.readouterr().out)
    row = json.loads(projection.read_text())["rows"][1]
    assert summary["step_time_s"] == row["prediction"]["step_time_s"]
    assert sum(summary["slowest_stage_s"].values()) == pytest.approx(summary["step_time_s"])
    document = json.loads(output.read_text())
    assert document["otherData"]["step_time_s"] == summary["step_time_s"]
    assert sum(event["ph"] == "X" for event in document["traceEvents"]) == summary["num_spans"]
    run_study("trace", *flags, "--detail", "passes")
    assert len(json.loads(output.read_text())["traceEvents"]) < len(document["traceEvents"])
    assert "4 stages x 1 chunks" in capsys.readouterr().out.splitlines()[-1]


def test_the_projection_is_not_overwritten(projection: Path) -> None:
    before = projection.read_bytes()
    other_name = projection.parent / ".." / projection.parent.name / projection.name
    with pytest.raises(ConfigError, match=r"output: must be another file than --projection, got .*projection\.json"):
        run_study("trace", "--projection", str(projection), "--row", "4-1", "--output", str(other_name))
    assert projection.read_bytes() == before


def test_a_row_of_other_coefficients_is_refused(projection: Path, tmp_path: Path) -> None:
    document = json.loads(projection.read_text())
    changed = tmp_path / "projection.json"
    flags = ("--projection", str(changed), "--row", "4-1", "--output", str(tmp_path / "step.json"))
    document["cost_model"]["coefficients"]["shared"]["host_s"] *= 2
    changed.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"projection\.json: row 4-1 must have the step time that this version"):
        run_study("trace", *flags)
    changed.write_text(json.dumps(document | {"cost_model": None}))
    with pytest.raises(
        ConfigError, match=r"cost_model must hold the coefficients .*got nothing\. Write the file again"
    ):
        run_study("trace", *flags)
    assert not (tmp_path / "step.json").exists()


def test_a_file_of_another_origin_is_not_overwritten(projection: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.py"
    output.write_text("import megatron_hammer\n")
    with pytest.raises(OutputError, match=r"train\.py: file must be an earlier result of this command"):
        run_study("trace", "--projection", str(projection), "--row", "4-1", "--output", str(output))
    assert output.read_text() == "import megatron_hammer\n"
