"""The files of a validation say the same as its JSON, and are the same bytes each time."""

import argparse
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import validate as command
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.evidence.validation import ValidationReport, validate_runs
from megatron_hammer.scaling.evidence.validation_report import (
    build_validation_document,
    describe_memory,
    describe_report,
    draw_scatter,
    format_csv,
    list_rows,
    print_report,
)
from megatron_hammer.scaling.published.measured_runs import read_runs
from tests.helpers.messages import assert_problem
from tests.helpers.run_tables import write_table


def build(path: Path, *rows: dict[str, str]) -> ValidationReport:
    runs, unpredictable = read_runs(write_table(path, *rows))
    return validate_runs(runs, unpredictable, replace(load_coefficients(), provenance={}))


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(words))
    return capsys.readouterr().out


def test_files_and_json_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "runs.csv", {}, {"gpu_type": "abacus"})
    text = run_command(capsys, "--runs", str(path), "--json", "--output-dir", str(tmp_path / "out"))
    document = json.loads(text)
    assert json.loads((tmp_path / "out" / "validation.json").read_text()) == document
    assert document["summary"] == {"rows": 2, "counted": 1, "fitted": 0, "unpredictable": 1, "out_of_memory": 0}
    assert [row["status"] for row in document["rows"]] == ["predicted", "unpredictable"]
    assert_problem(document["rows"][1]["reason"], "its GPU 'abacus'", "not known", "--gpus-file")
    assert document["errors"]["all"]["all rows"]["num_rows"] == 1
    with (tmp_path / "out" / "validation.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert float(cells[0]["predicted_s"]) == pytest.approx(document["rows"][0]["predicted_s"], rel=1e-5)
    assert cells[1]["predicted_s"] == ""
    assert (tmp_path / "out" / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "validation.png").read_bytes() == draw_scatter(
        build(tmp_path / "runs.csv", {}, {"gpu_type": "abacus"})
    )


def test_rows_that_would_be_out_of_memory_are_flagged_and_counted_by_source(tmp_path: Path) -> None:
    wide = {"hidden": "6144", "heads": "48", "kv_heads": "48", "ffn": "24576"}
    large = wide | {"sharding": "none", "source": "there"}
    report = build(tmp_path / "runs.csv", {"source": "here"}, large)
    assert dict(report.out_of_memory) == {"there": 1}
    small, flagged = list_rows(report)
    assert (small["is_out_of_memory"], flagged["is_out_of_memory"]) == (False, True)
    assert flagged["memory_gib"] > 80 > small["memory_gib"] > 0
    assert build_validation_document(report)["out_of_memory"] == {"there": 1}
    assert "1 of 2 plans would be out of memory" in describe_memory(report)
    stream = io.StringIO()
    print_report(report, stream)
    assert sum(line.split()[-1:] == ["M"] for line in stream.getvalue().splitlines()) == 1
    fitting = build(tmp_path / "runs.csv", {})
    assert describe_memory(fitting) == "None of the 1 plans would be out of memory."


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build(tmp_path / "runs.csv", {}, {"tp": "4", "dp": "4"}) for _ in range(2))
    assert format_csv(first) == format_csv(second)


def test_nothing_to_plot_and_nothing_to_quote(tmp_path: Path) -> None:
    report = build(tmp_path / "runs.csv", {"seq": ""})
    assert draw_scatter(report) is None
    assert describe_report(report) == "1 rows: 0 predicted, 0 fitted, 1 unpredictable"
