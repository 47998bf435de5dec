"""A validation of nothing is an error, after everything that there is to say is printed."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study import validate
from megatron_hammer.errors import DataError
from tests.helpers.run_tables import write_table


def run(*flags: str) -> None:
    parser = argparse.ArgumentParser()
    validate.add_arguments(parser)
    validate.run(parser.parse_args(flags))


@pytest.mark.parametrize("rows", [(), ({"gpu_type": "abacus"},)], ids=["no rows", "no row that can be predicted"])
def test_a_table_without_a_prediction_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows) -> None:
    path = write_table(tmp_path / "runs.csv", *rows)
    with pytest.raises(DataError, match=r"runs.csv: must hold a row that can be predicted, got none"):
        run("--runs", str(path), "--json")
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(rows)


def test_a_place_that_cannot_be_written_is_named_first(tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", {})
    with pytest.raises(Exception, match=r"runs.csv/validation.json: file cannot be written"):
        run("--runs", str(path), "--output-dir", str(path))
