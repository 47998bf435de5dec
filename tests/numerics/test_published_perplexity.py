"""The averages of HammerLLM's published tables follow from their columns; one of the 30 rows is printed wrong."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.evaluation.perplexity.formula import average_perplexity

TABLES = tomllib.loads(Path(__file__).with_name("hammerllm_perplexity.toml").read_text())["tables"]
ROWS = [pytest.param(*row[2:], id=f"{row[0]} {row[1]} {len(row)}") for table in TABLES for row in table["rows"]]
TOLERANCE = 0.0101  # the averages and their columns are rounded to 0.01
PRINTED_WRONG = 92.92  # Gemma-2B, Chinese; its columns give 95.92


def test_there_are_thirty_rows_of_two_tables() -> None:
    assert [len(table["rows"]) for table in TABLES] == [14, 16]
    assert all(len(row) == 2 + len(table["columns"]) for table in TABLES for row in table["rows"])


@pytest.mark.parametrize("values", [row.values for row in ROWS if row.values[-1] != PRINTED_WRONG], ids=str)
def test_a_printed_average_is_the_geometric_mean_of_its_columns(values: Any) -> None:
    *columns, average = values
    assert average_perplexity(columns) == pytest.approx(average, abs=TOLERANCE)
    # The twin: the arithmetic mean is another number, except where all columns are nearly equal.
    finite = [value for value in columns if value == value]
    if max(finite) > 2 * min(finite):
        assert sum(finite) / len(finite) != pytest.approx(average, abs=TOLERANCE)


def test_one_row_is_printed_wrong() -> None:
    (row,) = [row.values for row in ROWS if row.values[-1] == PRINTED_WRONG]
    assert average_perplexity(row[:-1]) == pytest.approx(95.92, abs=0.005)
