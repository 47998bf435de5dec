"""CSV that a spreadsheet shows as text: names come from files and flags of users, and "=..." would be computed."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

# Spreadsheets compute a cell that begins with one of these (OWASP, "CSV Injection"). An apostrophe makes it text.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of a CSV file; None is an empty cell. Numbers stay as they are, and `read_cell` undoes the rest."""
    return "".join(_format_row(row) for row in (columns, *rows))


def _format_row(row: Sequence[Any]) -> str:
    text = io.StringIO()
    # The csv module quotes a carriage return inside a cell only where it ends lines too.
    csv.writer(text, lineterminator="\r\n").writerow([_format_cell(cell) for cell in row])
    return text.getvalue().removesuffix("\r\n") + "\n"


def _format_cell(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _is_formula(cell) and not _is_number(cell) else cell


def _is_formula(text: str) -> bool:
    """Also of a text with apostrophes of its own before it, or the reader would take the first one for ours."""
    return text.lstrip("'").startswith(FORMULA_STARTS)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_cell(text: str) -> str:
    """The text that `format_csv` wrote as this cell."""
    return text[1:] if text.startswith("'") and _is_formula(text) else text
