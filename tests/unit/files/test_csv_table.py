import csv
import io
from pathlib import Path

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.files.csv_table import format_csv, read_cell, read_csv

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x","y")', "'=1+1", "''-0.5"]


def read_first_cell(text: str) -> str:
    return list(csv.reader(io.StringIO(text, newline="")))[1][0]


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_formula_is_text_and_comes_back(cell: str) -> None:
    written = read_first_cell(format_csv(["name"], [[cell]]))
    assert written == f"'{cell}"
    assert read_cell(written) == cell


@pytest.mark.parametrize("cell", ["-0.5", "+3", "-1e-3", "llama3-8b", "a=b", "'quoted'", "", "'"])
def test_numbers_and_other_texts_stay(cell: str) -> None:
    written = read_first_cell(format_csv(["name"], [[cell, "x"]]))
    assert written == cell
    assert read_cell(written) == cell


def test_numbers_and_none() -> None:
    assert format_csv(["a", "b", "c"], [[-1.5, None, 7]]) == "a,b,c\n-1.5,,7\n"


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ("a;b;c", "semicolons"),
        ("a;b", "semicolons"),
        ("a\tb\tc", "tabs"),
        ("a|b|c", "bars"),
        ("a;b;c, d", "semicolons"),
    ],
)
def test_another_separator_is_named(tmp_path: Path, header: str, word: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\n1;2;3\n", encoding="utf-8-sig")
    with pytest.raises(DataError, match=rf"table\.csv:1: cells must be separated by commas, got {word}"):
        read_csv(path)


def test_a_comma_file_may_have_other_separators_in_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("name|id,b\nx;y,2\n", encoding="utf-8-sig")
    assert read_csv(path) == (["name|id", "b"], [(2, ["x;y", "2"])])
