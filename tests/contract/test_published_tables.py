"""The shipped tables and what their README says about them."""

import csv
import re

import pytest

from megatron_hammer.scaling.published.run_table import TABLES_DIR

README = (TABLES_DIR / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_table_with_its_number_of_rows() -> None:
    listed = {
        name: int(rows.replace(",", "")) for name, rows in re.findall(r"^\| (\S+\.csv) \| ([\d,]+) \|", README, re.M)
    }
    rows = {}
    for path in TABLES_DIR.glob("*.csv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows[path.name] = sum(1 for _ in csv.reader(file)) - 1
    assert listed == rows
    assert len(rows) == 5


@pytest.mark.parametrize("table", ["published_runs.csv", "published_moe.csv"])
def test_the_readme_explains_every_column_of_the_runs(table: str) -> None:
    with (TABLES_DIR / table).open(encoding="utf-8", newline="") as file:
        columns = set(next(csv.reader(file)))
    assert {name for name in columns if not re.search(rf"\b{name}\b", README)} == set()


def test_every_published_row_names_its_source_and_where_it_was_copied_from() -> None:
    for name in ("published_runs.csv", "published_large_runs.csv", "published_moe.csv", "published_memory.csv"):
        with (TABLES_DIR / name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                assert row["source"], row
                assert row["provenance"], row


def test_the_licence_lies_beside_the_measurements_of_vtrain() -> None:
    assert "VIA Research Group at KAIST" in (TABLES_DIR / "vtrain_LICENSE.txt").read_text(encoding="utf-8")
