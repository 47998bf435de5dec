import csv
import io

import pytest

from megatron_hammer.files.csv_table import format_csv, read_cell

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
