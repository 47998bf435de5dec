"""`measure` and `profile` as a user runs them: real trainings and real timings of this machine's CPU."""

import csv
import json
from pathlib import Path

import pytest

from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.hardware.catalogue import load_clusters, load_gpus
from megatron_hammer.scaling.published.measured_runs import read_runs
from tests.helpers.tool_runs import Finished, run_tool

pytestmark = pytest.mark.integration


def study(*words: str) -> Finished:
    return run_tool("tools/scaling_study.py", *words, timeout_s=400)


def test_a_sweep_is_measured_and_continues_after_a_failure(tmp_path: Path) -> None:
    options = ("--presets", "hammer-tiny", "--steps", "3", "--warmup-steps", "1", "--output-dir", str(tmp_path))
    options += ("--seq-lengths", "64", "--platform", "cpu")
    first = study("measure", *options, "--global-batch-sizes", "2,3", "--", "--seed", "7")
    assert first.returncode == 1, first.stderr
    assert first.stderr.splitlines()[-1] == (
        f"2 runs of 2 settings: 2 run now, 0 finished before, 1 failed; 1 rows in {tmp_path / 'runs.csv'}"
    )
    problem = "error: hammer-tiny_single_s64_mb2_gb3: exit code 2: global-batch-size: must be a multiple of"
    assert problem in first.stderr
    records = {
        path.parent.name.split("_")[-1][:3]: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/run.json")
    }
    assert {name: record["status"] for name, record in records.items()} == {"gb2": "complete", "gb3": "failed"}
    assert "--seed" in records["gb2"]["command"]
    with (tmp_path / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["gpus"], row["gpu_type"], row["global_batch"]) == ("hammer-tiny", "1", "cpu-core", "2")
    ((run,), unpredictable) = read_runs(tmp_path / "runs.csv")
    assert unpredictable == []
    assert run.step_time_s == pytest.approx(float(row["iteration_time_s"]))

    again = study("measure", *options, "--global-batch-sizes", "2", "--", "--seed", "7")
    assert again.returncode == 0, again.stderr
    assert "0 run now, 1 finished before, 0 failed" in again.stderr.splitlines()[-1]
    assert again.stdout.startswith("hammer-tiny_single_s64_mb2_gb2: ")


def test_profile_of_this_machine(tmp_path: Path) -> None:
    result = study("profile", "--platform", "cpu", "--output-dir", str(tmp_path), "--seconds-per-operator", "0.001")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].endswith(f"timings, cpu-core on cpu-host in {tmp_path}")
    gpu = load_gpus(tmp_path / "gpus.toml")["cpu-core"]
    assert 0.001 < gpu.fp32_tflops < 10
    cluster = load_clusters(tmp_path / "clusters.toml")["cpu-host"]
    assert 1e6 < cluster.nvlink_bytes_per_s < 1e12
    coefficients = load_coefficients(tmp_path / "coefficients.toml")
    assert 0 < coefficients.select_gpu(gpu).gemm_ratio <= 1
    reports = [json.loads((tmp_path / f"operators-{number}.json").read_text()) for number in (1, 2)]
    assert [report["num_processes"] for report in reports] == [1, 2]
    collectives = {timing["operator"] for timing in reports[1]["timings"]}
    assert {"all_reduce", "all_gather", "reduce_scatter", "send_receive"} <= collectives


@pytest.mark.parametrize(
    "words, message",
    [
        (["--layouts", "tp2"], "presets: must name one at least, got none. Pass --presets hammer-tiny, or --sweep"),
        (["--presets", "hammer-tiny", "--repeats", "0"], "repeats: must be at least 1, got 0. Raise it."),
        (
            ["--presets", "hammer-tiny", "--steps", "5"],
            "steps: must be more than the warm-up, got steps=5, warmup_steps=5. Raise --steps, or lower",
        ),
        (
            ["--presets", "hammer-tiny", "--sweep", "sweep.toml"],
            "sweep: takes the place of --presets, got both. Put them into sweep.toml.",
        ),
    ],
)
def test_sweeps_that_cannot_be_measured_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    result = study("measure", *words, "--output-dir", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
