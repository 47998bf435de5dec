"""CSV that a spreadsheet shows as text: names come from files and flags of users, and "=..." would be computed."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.errors import DataError, HammerError
from megatron_hammer.files.read import cannot_read

# Spreadsheets compute a cell that begins with one of these (OWASP, "CSV Injection"). An apostrophe makes it text.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
Record = tuple[int, list[str]]  # (the line on which it starts, cells)


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


def read_csv(path: Path, *, raises: type[HammerError] = DataError) -> tuple[list[str], list[Record]]:
    """Return the column names in lower case, and every record that is not empty, as `format_csv` was given them.

    Raises `raises` for a file that is no CSV in UTF-8 or has no header.
    """
    records = []
    try:
        # utf-8-sig drops a byte order mark, which would become part of the first column's name. newline="" is what the
        # csv module needs to read line breaks inside quoted cells.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            line = 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    records.append((line, [read_cell(cell) for cell in cells]))
                # A quoted cell may span several lines, so lines are not counted by records.
                line = reader.line_num + 1
    except OSError as error:
        raise cannot_read(path, error, raises=raises) from error
    except UnicodeDecodeError as error:
        raise raises(
            f"{path}: must be UTF-8 text, got {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise raises(f"{path}: must be a CSV file, got: {error}. Pass a CSV file.") from error
    if not records:
        raise raises(f"{path}:1: must be a header, got an empty file. Pass a CSV file with a header.")
    (_, header), *rest = records
    names = [name.strip().lower() for name in header]
    # Spreadsheets write semicolons where the comma is the decimal point.
    header_text = ",".join(names)
    if other := [word for sign, word in OTHER_SEPARATORS.items() if header_text.count(sign) >= len(names)]:
        raise raises(f"{path}:1: cells must be separated by commas, got {other[0]}. Save it with commas and points.")
    return names, rest


def list_repeated_columns(path: Path, names: Sequence[str]) -> list[str]:
    """A sentence for every name that the header has more than once."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    return [f"{path}:1: must have each column once, got {name} twice. Drop one of the two." for name in twice]


def describe_other_length(where: str, num_cells: int, num_columns: int) -> str:
    """The sentence for a record with more or fewer cells than the header."""
    return f"{where}: must have a cell for each of {num_columns} columns, got {num_cells}. Correct the row."
