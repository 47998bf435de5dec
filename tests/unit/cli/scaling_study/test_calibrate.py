"""The calibrate command reads files and writes coefficients and tables; every row that is left out is named."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import calibrate
from megatron_hammer.errors import DataError, OutputError
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, load_coefficients, save_coefficients
from tests.helpers.run_tables import write_table
from tests.helpers.tool_runs import run_tool


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    calibrate.run(parser.parse_args(list(words)))


@pytest.fixture
def table(tmp_path) -> Path:
    """Three runs of an unknown team, slower than the model believes, and one that says too little."""
    return write_table(
        tmp_path / "runs.csv",
        {"iteration_time_s": "0.45"},
        {"tp": "1", "dp": "16", "iteration_time_s": "0.42"},
        {"seq": "4096", "iteration_time_s": "0.95"},
        {"iteration_time_s": ""},
    )


def test_a_few_runs_change_the_coefficients_and_the_tables_show_it(tmp_path, table, capsys):
    output = tmp_path / "mine.toml"
    run("--runs", str(table), "--output", str(output))
    shipped, mine = load_coefficients(), load_coefficients(output)
    assert mine.gpus["hopper"].gemm_ratio != shipped.gpus["hopper"].gemm_ratio
    assert mine.gpus["volta"] == shipped.gpus["volta"]
    assert mine.provenance["num_runs"] == shipped.provenance["num_runs"] + 3
    out, err = capsys.readouterr()
    assert "hopper.gemm_ratio" in out
    assert "team_a" in out
    assert f"{table}:5: left out (team_a)" in err
    assert err.splitlines()[-1].startswith("calibrate: 3 runs fitted, 0 alike not needed, 1 left out; cross-validated")


def test_json_has_every_coefficient_before_and_after(tmp_path, table, capsys):
    start = tmp_path / "start.toml"
    save_coefficients(build_prior_coefficients(), start)
    run("--runs", str(table), "--output", str(tmp_path / "mine.toml"), "--start", str(start), "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["coefficients"]["volta.gemm_ratio"] == {"before": 0.75, "after": 0.75}
    assert report["cross_validated"]["all"]["num_runs"] == 3
    assert report["cross_validated"]["by_publication"]["team_a"]["median_ratio"] > 0
    assert report["band_ratio"]["default"] == 0.2


def test_a_fit_from_priors_records_no_earlier_runs(tmp_path, table):
    run("--runs", str(table), "--output", str(tmp_path / "mine.toml"), "--from-priors")
    assert load_coefficients(tmp_path / "mine.toml").provenance["num_runs"] == 3


def test_a_table_without_a_predictable_run_is_refused(tmp_path):
    table = write_table(tmp_path / "runs.csv", {"iteration_time_s": ""})
    with pytest.raises(DataError, match=r"runs\.csv: must hold a run.*got none"):
        run("--runs", str(table), "--output", str(tmp_path / "mine.toml"))
    assert not (tmp_path / "mine.toml").exists()


def test_the_script_has_the_calibrate_command(tmp_path):
    result = run_tool("tools/scaling_study.py", "calibrate", "--runs", tmp_path / "none.csv", "--output", "x")
    assert result.returncode == 2
    assert "none.csv" in result.stderr


def test_a_file_of_another_origin_is_not_overwritten(tmp_path, table):
    before = table.read_bytes()
    with pytest.raises(OutputError, match=r"runs\.csv: file must be an earlier result of this command"):
        run("--runs", str(table), "--output", str(table))
    assert table.read_bytes() == before
