"""examples/scaling_study.sh at its smallest: one measured run is calibrated on and compared with its projection."""

import csv
import json
from pathlib import Path

import pytest

from tests.helpers.tool_runs import run_example

pytestmark = pytest.mark.integration

SMALLEST = {
    "LAYOUTS": "single",
    "HELD_OUT_LAYOUTS": "-",
    "STEPS": "4",
    "WARMUP_STEPS": "1",
    "PROFILE_PROCESSES": "1",
    "PROFILE_S": "0.01",
    "CPU_PROCESSES": "1,2",
    "STUDIES": "hammer-1b4",
    "STUDY_GPUS": "8,64",
}


def test_a_sweep_is_measured_and_laid_over_its_projection(tmp_path: Path) -> None:
    result = run_example("scaling_study.sh", "--seed", "7", OUTPUT_DIR=tmp_path, **SMALLEST)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert "Traceback" not in result.stderr

    (measured,) = csv.DictReader((tmp_path / "runs.csv").open())
    assert (measured["model"], measured["gpus"], measured["gpu_type"]) == ("hammer-tiny", "1", "cpu-core")
    (facts,) = (tmp_path / "sweep" / "runs").glob("*/run.json")
    command_line = json.loads(facts.read_text())["command"]
    assert command_line[command_line.index("--seed") + 1] == "7", "flags given to the example must reach every run"

    projection = json.loads((tmp_path / "cpu" / "projection.json").read_text())
    (overlaid,) = projection["overlay"]["runs"]
    assert overlaid["measured_s"] == pytest.approx(float(measured["iteration_time_s"]))
    # Calibrated on this one run, it must come back near it; the priors pull it off by a little.
    assert overlaid["predicted_s"] == pytest.approx(overlaid["measured_s"], rel=0.25)

    reports = result.stdout.split("== reports\n")[1].splitlines()
    assert reports == [str(tmp_path / name / "report.html") for name in ("cpu", "hammer-1b4")]
    for report in reports:
        assert "data:image/png;base64," in Path(report).read_text(), "the report must hold its plots"
    launches = sorted(path.name for path in (tmp_path / "hammer-1b4" / "launch").iterdir())
    assert launches == [f"hammer-1b4-{gpus}-1.{kind}" for gpus in (64, 8) for kind in ("sbatch", "sh")]
