"""The rows of a table of runs or of memory figures, unchanged: cells of the right type, blanks as None.

Tables of runs have one of two headers: that of the published tables (and of `scaling_study.py measure`), or that of
vTrain's measured iteration times. Nothing is interpreted here: `measured_runs.py` and `memory/measured_memory.py` do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.csv_table import Record, describe_other_length, list_repeated_columns, read_csv
from megatron_hammer.scaling.plan import NonNegativeInt

TABLES_DIR = Path(__file__).parent / "tables"  # its README.md says what they are
PUBLISHED_RUNS_PATH = TABLES_DIR / "published_runs.csv"
PUBLISHED_LARGE_RUNS_PATH = TABLES_DIR / "published_large_runs.csv"
PUBLISHED_MOE_PATH = TABLES_DIR / "published_moe.csv"
VTRAIN_RUNS_PATH = TABLES_DIR / "vtrain_ground_truth_single.csv"
PUBLISHED_MEMORY_PATH = TABLES_DIR / "published_memory.csv"

BLANKS = frozenset({"", "-", "na", "n/a", "none", "null", "nan"})
# No row can be predicted without these columns. Any other column may be absent, as if all of its cells were blank.
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
MEMORY_COLUMNS = ("model", "quantity", "memory_value", "unit")
VTRAIN_SOURCE = "vTrain_ground_truth_single"
# Beyond all sense, and lists of so many layers, stages or experts would not end.
LARGEST_COUNT = 2**31 - 1
LARGEST_COUNTS = dict.fromkeys(("layers", "moe_layers", "dense_layers", "mtp_layers", "pp", "vpp", "topk"), 100_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One row of a table of runs. row_number: its line in the file; the header is line 1."""

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
    # Of models with experts. In these columns 0 says that there is none, and a blank that it is not known.
    params_active_b: float | None = None
    head_dim: int | None = None
    experts: int | None = None
    topk: int | None = None
    moe_ffn: int | None = None
    shared_ffn: NonNegativeInt | None = None
    dense_layers: NonNegativeInt | None = None
    moe_layers: int | None = None
    etp: int | None = None
    attention: str = ""  # gqa or mla
    q_lora: int | None = None
    kv_lora: int | None = None
    qk_head: int | None = None
    v_head: int | None = None
    rope_head: int | None = None
    dispatcher: str = ""
    cuda_graphs: str = ""
    overlap_ep: bool | None = None
    routing: str = ""
    mtp_layers: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRow(RunRow):
    """One row of a table of memory figures: the run's cells, and what was measured of its memory."""

    quantity: str = ""  # in words
    memory_value: str = ""  # a number, or a formula
    unit: str = ""
    measured_or_model: str = ""


def read_memory_rows(path: Path) -> list[MemoryRow]:
    """Every row of a CSV file of memory figures, in its order. Raises ConfigError as `read_run_rows` does."""
    names, records = read_csv(path, raises=ConfigError)
    missing = [name for name in MEMORY_COLUMNS if name not in names]
    problems = list_repeated_columns(path, names)
    if missing:
        problems.append(
            f"{path}:1: must have the columns {', '.join(MEMORY_COLUMNS)}, got no {', '.join(missing)}. "
            "Pass a table of memory figures."
        )
    if problems:
        raise ConfigError(*problems)
    return _parse_rows(MemoryRow, names, records, path)


def read_run_rows(path: Path) -> list[RunRow]:
    """Every row of a CSV file of measured runs, in its order.

    Raises ConfigError for an unreadable file or header, and once with all cells of the wrong type, each with its line,
    column and value.
    """
    names, records = read_csv(path, raises=ConfigError)
    is_vtrain = set(VTRAIN_COLUMNS) <= set(names)
    names = [VTRAIN_COLUMNS.get(name, name) if is_vtrain else name for name in names]
    if not is_vtrain:
        _check_header(names, path)
    rows = _parse_rows(RunRow, names, records, path)
    return [_as_vtrain(row) for row in rows] if is_vtrain else rows


def _check_header(names: list[str], path: Path) -> None:
    problems = []
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        problems.append(
            f"{path}:1: must have the columns {', '.join(REQUIRED_COLUMNS)}, got no {', '.join(missing)} among "
            f"{_shorten(names)}. Add what is missing; cells may be blank."
        )
    if not set(MEASUREMENT_COLUMNS) & set(names):
        problems.append(
            f"{path}:1: must have one of the columns {', '.join(MEASUREMENT_COLUMNS)}, got {_shorten(names)}. "
            "Add what was measured."
        )
    problems += list_repeated_columns(path, names)
    if problems:
        raise ConfigError(*problems)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _parse_rows[R: RunRow](kind: type[R], names: list[str], records: list[Record], path: Path) -> list[R]:
    """Raises ConfigError once with every cell that cannot be parsed."""
    parsers = {field.name: _PARSER_OF_TYPE[field.type] for field in fields(kind) if field.name != "row_number"}
    parsers |= {name: partial(parsers[name], most=most) for name, most in LARGEST_COUNTS.items()}
    problems: list[str] = []
    rows = []
    for line, cells in records:
        if len(cells) == len(names):
            values = _parse_cells(dict(zip(names, cells, strict=True)), parsers, f"{path}:{line}", problems)
            rows.append(kind(row_number=line, **values))
        else:
            problems.append(describe_other_length(f"{path}:{line}", len(cells), len(names)))
    if problems:
        raise ConfigError(*problems)
    return rows


def _parse_cells(
    cells: Mapping[str, str], parsers: Mapping[str, Callable[[str], Any]], where: str, problems: list[str]
) -> dict[str, Any]:
    """Values by field; what is wrong with a cell is appended to `problems`."""
    values: dict[str, Any] = {}
    for name, parse in parsers.items():
        try:
            values[name] = parse(cells.get(name, "").strip())
        except ValueError as error:
            problems.append(
                f"{where}: {name}: must be {error}, got {cells[name]!r}. Correct the cell or leave it blank."
            )
    return values


def _parse_count(text: str, least: int = 1, most: int = LARGEST_COUNT) -> int | None:
    expected = f"a whole number of at least {least}"
    number = _parse_number(text, expected)
    if number is None:
        return None
    if number > most:
        raise ValueError(f"a whole number of at most {most:,}")
    if number < least or number != int(number):
        raise ValueError(expected)
    return int(number)


def _parse_quantity(text: str) -> float | None:
    number = _parse_number(text, "a finite number above 0")
    if number is not None and number <= 0:
        raise ValueError("a finite number above 0")
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


_PARSER_OF_TYPE: dict[Any, Callable[..., Any]] = {
    str: str,
    int | None: _parse_count,
    NonNegativeInt | None: partial(_parse_count, least=0),
    float | None: _parse_quantity,
    bool | None: _parse_flag,
}


def _as_vtrain(row: RunRow) -> RunRow:
    """A row of vTrain with what its table has no column for; software.toml names the source of these facts."""
    return replace(
        row,
        source=VTRAIN_SOURCE,
        model=f"GPT-h{row.hidden}-l{row.layers}",
        gpu_type="A100",
        iteration_time_s=None if row.iteration_time_s is None else row.iteration_time_s / 1e3,
    )
