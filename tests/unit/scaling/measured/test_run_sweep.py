"""A sweep continues where it stopped, records failures, and leaves no process. Training is replaced by a stand-in."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.scaling.measured import run_sweep as measure
from megatron_hammer.scaling.measured.run_sweep import Machine, Outcome, collect_measured, run_sweep
from megatron_hammer.scaling.measured.sweep import Setting, Sweep, list_settings

MACHINE = Machine(platform="cpu", gpu_type="cpu-core", num_threads=1, timeout_s=60)
TRAIN = """
import json, sys
with open(sys.argv[1], "w") as file:
    for step in range(1, int(sys.argv[2]) + 1):
        file.write(json.dumps({"step": step, "step_time_s": 1 / step}) + "\\n")
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the settings that were started; dp3 fails, and dp4 loses its last step."""
    names: list[str] = []

    def build_command(setting: Setting, machine: Machine, metrics_path: Path) -> list[str]:
        names.append(setting.layout_name)
        if setting.layout_name == "dp3":
            return ["bash", "-c", "echo start; echo 'error: pp: must divide, got 3. Use 2.'; exit 2"]
        num_steps = setting.steps - (setting.layout_name == "dp4")
        return [sys.executable, "-S", "-c", TRAIN, str(metrics_path), str(num_steps)]

    monkeypatch.setattr(measure, "build_command", build_command)
    return names


def sweep(
    output_dir: Path, *layouts: str, machine: Machine = MACHINE, repeats: int = 1, **changes: Any
) -> list[Outcome]:
    settings = list_settings(Sweep(presets=("hammer-tiny",), layouts=layouts, **{"steps": 5, **changes}))
    said: list[str] = []
    outcomes = run_sweep(settings, machine, output_dir, num_repeats=repeats, num_warmup_steps=1, say=said.append)
    assert len(said) == len(outcomes)
    return outcomes


def test_finished_runs_are_kept(started: list[str], tmp_path: Path) -> None:
    (first,) = sweep(tmp_path, "single")
    assert first.is_new
    assert first.times is not None
    assert first.times.fastest_s == pytest.approx(1 / 5)
    again = sweep(tmp_path, "single", "tp2")
    assert started == ["single", "tp2"]
    assert [outcome.is_new for outcome in again] == [False, True]
    assert again[0].times == first.times


def test_a_changed_setting_is_a_new_run(started: list[str], tmp_path: Path) -> None:
    sweep(tmp_path, "single")
    sweep(tmp_path, "single", flags=("--seed", "5"))
    sweep(tmp_path, "single", steps=6)
    sweep(tmp_path, "single", machine=Machine(platform="cpu", gpu_type="cpu-core", num_threads=2, timeout_s=60))
    assert len(started) == 4
    assert len(list((tmp_path / "runs").iterdir())) == 4
    sweep(tmp_path, "single", repeats=2)
    assert len(started) == 5  # the first repeat was there


def test_a_failed_run_is_recorded_and_tried_again(started: list[str], tmp_path: Path) -> None:
    outcomes = sweep(tmp_path, "dp3", "dp4", "single")
    assert [outcome.reason for outcome in outcomes] == [
        "exit code 2: pp: must divide, got 3. Use 2.",
        "ended without all 5 steps in metrics.jsonl",
        None,
    ]
    assert [entry.setting.layout_name for entry in collect_measured(outcomes)] == ["single"]
    (record_path,) = (tmp_path / "runs").glob("*dp3*/run.json")
    record = json.loads(record_path.read_text())
    assert (record["status"], record["exit_code"], record["settings"]["num_processes"]) == ("failed", 2, 3)
    sweep(tmp_path, "dp3", "single")
    assert started == ["dp3", "dp4", "single", "dp3"]


def test_a_run_without_its_metrics_is_run_again(started: list[str], tmp_path: Path) -> None:
    sweep(tmp_path, "single")
    (metrics_path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    metrics_path.write_text(metrics_path.read_text()[:-20])
    (outcome,) = sweep(tmp_path, "single")
    assert outcome.is_new
    assert outcome.times is not None


def test_a_foreign_run_record_is_refused(started: list[str], tmp_path: Path) -> None:
    sweep(tmp_path, "single")
    (record_path,) = (tmp_path / "runs").glob("*/run.json")
    record_path.write_text("[]")
    with pytest.raises(DataError, match=r"run\.json: .*got \[\]\. Move the file away\."):
        sweep(tmp_path, "single")
    record_path.write_text("{")
    with pytest.raises(DataError, match=r"run\.json: content must be JSON, got.*\. Move the file away\."):
        sweep(tmp_path, "single")
    record_path.write_text('{"status": "running"}')
    with pytest.raises(DataError, match=r"run\.json: status must be .*got 'running'\. Move the file away\."):
        sweep(tmp_path, "single")


def test_nothing_is_left_of_a_run_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is a shell that ignores SIGTERM, with a child in a session of its own, as torchrun starts them."""
    script = f"trap '' TERM; setsid sleep 300 & echo $! >{tmp_path}/child; while :; do sleep 0.05; done"
    monkeypatch.setattr(measure, "STOP_GRACE_S", 0.3)
    monkeypatch.setattr(measure, "build_command", lambda *_: ["bash", "-c", script])
    machine = Machine(platform="cpu", gpu_type="cpu-core", num_threads=1, timeout_s=0.5)
    (outcome,) = sweep(tmp_path, "single", machine=machine)
    assert outcome.reason == "did not end within 0.5 s"
    child = int((tmp_path / "child").read_text())
    deadline_s = time.monotonic() + 60
    while psutil.pid_exists(child) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_reason_of_a_run_without_a_sentence(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    output.write_text("one\n\ntwo\nthree\nfour\nfive\nsix\n")
    assert measure.read_reason(output) == "two | three | four | five | six"
    output.write_text("")
    assert measure.read_reason(output) == "no output"


def test_command_of_a_run(tmp_path: Path) -> None:
    (setting,) = list_settings(Sweep(presets=("hammer-tiny",), layouts=("tp2-pp2",)))
    command = measure.build_command(setting, MACHINE, tmp_path / "metrics.jsonl")
    assert command[:6] == [
        sys.executable, "-m", "megatron_hammer.training.launch", "--standalone", "--nproc-per-node", "4",
    ]  # fmt: skip
    assert command[-4:] == ["--platform", "cpu", "--metrics-path", str(tmp_path / "metrics.jsonl")]
