"""The command: decisions and tables, JSON, CSV and a chart, and every problem of every option at once."""

import csv
import json
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from tests.helpers.study_commands import run_study

JOBS = ("--job", "a100-sxm-80gb:2,4", "h100-sxm@aws-p5:2:fp8")
SMALL = ("compare", "--preset", "hammer-tiny", "--train-tokens", "1T", "--tensor-model-parallel-size", "1")


def test_the_decision_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("--usd-per-gpu-hour", "1", "h100-sxm=3", "--grid-kgco2-per-kwh", "0.5", "aws-p5=0.1", "--pue", "1.5")
    run_study(*SMALL, *JOBS, *prices, "--output-dir", str(tmp_path))
    output = capsys.readouterr().out
    assert [line.split(":")[0] for line in output.splitlines()[:4]] == [
        "Fastest",
        "Cheapest",
        "Least energy",
        "Least CO2",
    ]
    assert output.splitlines()[-1].startswith("3 options, 3 feasible; ")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.csv", "comparison.json", "comparison.png",
    ]  # fmt: skip
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open(encoding="utf-8")))
    assert [row["option"] for row in rows] == [
        "a100-sxm-80gb x 2 (dgx-a100) fp32", "a100-sxm-80gb x 4 (dgx-a100) fp32", "h100-sxm x 2 (aws-p5) fp8",
    ]  # fmt: skip
    assert [float(row["usd_per_gpu_hour"]) for row in rows] == [1.0, 1.0, 3.0]
    assert {float(row["power_usage_effectiveness"]) for row in rows} == {1.5}
    ratios = [float(row["co2_tonnes"]) / float(row["energy_mwh"]) for row in rows]
    assert ratios == pytest.approx([0.5, 0.5, 0.1])
    document = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert document["verdicts"][0]["sentence"] == output.splitlines()[0]
    assert sum(option["probability_least_days"] for option in document["options"]) == pytest.approx(1.0)


def test_json_is_alone_on_stdout_and_a_single_point_is_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The larger model needs more than the first GPU has.
    jobs = ("--job", "a100-sxm-80gb:1", "b300-sxm:1", "--preset", "llama2-7b")
    run_study("compare", *jobs, "--global-batch-size", "8", "--json", "--output-dir", str(tmp_path))
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [option["problem"] is None for option in document["options"]] == [False, True]
    assert captured.err.splitlines()[-1].startswith("2 options, 1 feasible; ")
    assert not (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--job", "h100-sxm"), r"job: must be GPU\[@CLUSTER\]:N.*got 'h100-sxm'"),
        (("--job", "h100-sxm:8"), r"job: must name at least two options, got one"),
        (("--job", "h100-sxm:8", "h100-sxm:8"), r"job: must name each option once, got h100-sxm@dgx-h100:8 twice"),
        (("--job", "h100-sxm:8", "a100-sxm-80gb:8:fp8"), r"a100-sxm-80gb:8:fp8: precision: .*got precision=fp8"),
        (("--job", "h100-sxm:8", "x900:8"), r"x900:8: gpu: must be a known GPU"),
        (("--job", "h100-sxm:8:int8", "h100-sxm:9"), r"precision: must be of .*got int8"),
        ((*JOBS, "--pue", "0.9"), r"pue: must be a number from 1 to 10.*got '0\.9'"),
        ((*JOBS, "--grid-kgco2-per-kwh", "0"), r"grid-kgco2-per-kwh: must be a number from 1e-06 to 10.*got '0'"),
        ((*JOBS, "--usd-per-gpu-hour", "h100-sxm=0"), r"usd-per-gpu-hour: .*got 'h100-sxm=0'.*leave h100-sxm out"),
        ((*JOBS, "--usd-per-gpu-hour", "1e308"), r"usd-per-gpu-hour: must be a number .*got '1e308'"),
        ((*JOBS, "--usd-per-gpu-hour", "nan"), r"usd-per-gpu-hour: must be a number .*got 'nan'"),
        ((*JOBS, "--usd-per-gpu-hour", "v100=1"), r"usd-per-gpu-hour: must name a GPU or a cluster .*got v100"),
        ((*JOBS, "--grid-kgco2-per-kwh", "1", "2"), r"grid-kgco2-per-kwh: must be given once for each name, got '2'"),
    ],
)
def test_bad_values_are_named(flags: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        run_study(*SMALL, *flags)


def test_problems_of_all_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as raised:
        run_study(*SMALL, "--job", "x900:8", "h100-sxm:0", "--pue", "a")
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["x900", "h100-sxm", "pue"]


def test_where_no_option_fits_it_is_an_error_after_everything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        run_study(*SMALL, "--job", "a100-sxm-80gb:7", "h100-sxm:7", "--output-dir", str(tmp_path))
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "a100-sxm-80gb x 7 (dgx-a100) fp32", "h100-sxm x 7 (dgx-h100) fp32",
    ]  # fmt: skip
    assert capsys.readouterr().out.startswith("2 options, 0 feasible; ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.csv", "comparison.json"]


def test_a_problem_of_all_options_is_reported_once() -> None:
    with pytest.raises(ConfigError) as raised:
        run_study("compare", "--preset", "nobody", "--job", "h100-sxm:8", "a100-sxm-80gb:8")
    (problem,) = raised.value.problems
    assert problem.startswith("preset: must be a shipped one, got preset='nobody'")
