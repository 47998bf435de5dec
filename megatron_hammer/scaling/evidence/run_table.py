"""The rows of a table of measured runs as they stand: cells of the right type, blanks as None, nothing interpreted.

Two headers are known: that of the published tables (and of `scaling_study.py measure`), and that of vTrain's measured
iteration times. `measured_runs.py` says what a row means.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError

BLANKS = frozenset({"", "-", "na", "n/a", "none", "null", "nan"})
# Without these nothing can be said of any row; any other column may be absent, as if all its cells were blank.
REQUIRED_COLUMNS = ("model", "layers", "hidden", "seq", "gpus", "gpu_type", "tp", "pp", "dp", "global_batch")
MEASUREMENT_COLUMNS = ("iteration_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")
# vTrain's header -> ours. Its time is in milliseconds.
VTRAIN_COLUMNS = {
    "# gpus": "gpus",
    "global batch": "global_batch",
    "micro batch": "micro_batch",
    "hidden size": "hidden",
    "attention heads": "heads",
    "# layers": "layers",
    "sequence length": "seq",
    "tensor parallelism": "tp",
    "data parallelism": "dp",
    "pipeline parallelism": "pp",
    "iteration time (ms)": "iteration_time_s",
}
VTRAIN_SOURCE = "vTrain_ground_truth_single"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """One row under the published header. row_number: its line in the file, the header's being 1."""

    row_number: int
    source: str = ""
    model: str = ""
    params_b: float | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    seq: int | None = None
    gpus: int | None = None
    gpu_type: str = ""
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    dp: int | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    precision: str = ""
    recompute: str = ""
    iteration_time_s: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    tokens_per_s_per_gpu: float | None = None
    sharding: str = ""
    mfu_definition: str = ""
    derived_fields: str = ""
    provenance: str = ""
    notes: str = ""
    sequence_parallel: bool | None = None
    ep: int | None = None


def read_rows(path: Path) -> list[PublishedRow]:
    """Every row of a CSV file, in its order.

    Raises ConfigError for an unreadable file or header, and once with all cells that hold something else than they
    should, each with its line, column and value.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = _read_records(csv.reader(file), path)
    except OSError as error:
        raise ConfigError(f"{path}: must be a readable file, got {error.strerror}. Pass a CSV file.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a CSV file in UTF-8, got: {error}. Pass a CSV file.") from error
    if not records:
        raise ConfigError(f"{path}:1: must be a header, got an empty file. Pass a CSV file with a header.")
    (_, header), *rest = records
    names = [name.strip().lower() for name in header]
    is_vtrain = set(VTRAIN_COLUMNS) <= set(names)
    names = [VTRAIN_COLUMNS.get(name, name) if is_vtrain else name for name in names]
    if not is_vtrain:
        _check_header(names, path)
    problems: list[str] = []
    rows = [_parse_row(line, cells, names, path, problems) for line, cells in rest]
    if problems:
        raise ConfigError(*problems)
    return [_as_vtrain(row) for row in rows] if is_vtrain else rows


def _read_records(reader: Any, path: Path) -> list[tuple[int, list[str]]]:
    """(line, cells) of every record that is not empty; the line is that on which the record starts."""
    records = []
    line = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            records.append((line, cells))
        line = reader.line_num + 1
    return records


def _check_header(names: list[str], path: Path) -> None:
    problems = [
        f"{path}:1: must have the column {name}, got {', '.join(names)}. Add it; its cells may be blank."
        for name in REQUIRED_COLUMNS
        if name not in names
    ]
    if not set(MEASUREMENT_COLUMNS) & set(names):
        problems.append(
            f"{path}:1: must have one of the columns {', '.join(MEASUREMENT_COLUMNS)}, got {', '.join(names)}. "
            "Add what was measured."
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    problems += [f"{path}:1: must have each column once, got {name} twice. Drop one of the two." for name in twice]
    if problems:
        raise ConfigError(*problems)


def _parse_row(line: int, record: list[str], names: list[str], path: Path, problems: list[str]) -> PublishedRow:
    """The row of one record; what is wrong with it is appended to `problems`."""
    if len(record) != len(names):
        problems.append(
            f"{path}:{line}: must have a cell for each of {len(names)} columns, got {len(record)}. Correct the row."
        )
        return PublishedRow(row_number=line)
    cells = dict(zip(names, record, strict=True))
    values: dict[str, Any] = {}
    for name, parse in _PARSERS.items():
        try:
            values[name] = parse(cells.get(name, "").strip())
        except ValueError as error:
            problems.append(
                f"{path}:{line}: {name}: must be {error}, got {cells[name]!r}. Correct the cell or leave it blank."
            )
    return PublishedRow(row_number=line, **values)


def _parse_count(text: str) -> int | None:
    number = _parse_number(text, "a whole number of at least 1")
    if number is None:
        return None
    if number < 1 or number != int(number):
        raise ValueError("a whole number of at least 1")
    return int(number)


def _parse_quantity(text: str) -> float | None:
    number = _parse_number(text, "a number above 0")
    if number is not None and number <= 0:
        raise ValueError("a number above 0")
    return number


def _parse_number(text: str, expected: str) -> float | None:
    if text.lower() in BLANKS:
        return None
    try:
        number = float(text)
    except ValueError:
        raise ValueError(expected) from None
    if not math.isfinite(number):
        raise ValueError(expected)
    return number


def _parse_flag(text: str) -> bool | None:
    if text.lower() in BLANKS:
        return None
    if text.lower() not in ("yes", "no"):
        raise ValueError("yes or no")
    return text.lower() == "yes"


_PARSER_OF_TYPE: dict[Any, Callable[[str], Any]] = {
    str: str,
    int | None: _parse_count,
    float | None: _parse_quantity,
    bool | None: _parse_flag,
}
_PARSERS = {field.name: _PARSER_OF_TYPE[field.type] for field in fields(PublishedRow) if field.name != "row_number"}


def _as_vtrain(row: PublishedRow) -> PublishedRow:
    """vTrain's row with what its header leaves out; where that comes from is said in software.py."""
    return replace(
        row,
        source=VTRAIN_SOURCE,
        model=f"GPT-h{row.hidden}-l{row.layers}",
        gpu_type="A100",
        iteration_time_s=None if row.iteration_time_s is None else row.iteration_time_s / 1e3,
    )
