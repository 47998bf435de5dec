"""The cells of a table of memory figures as they stand, and what the figure of a row counts.

`measured_memory.py` makes a run of a row.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.evidence.row_model import UnpredictableError
from megatron_hammer.scaling.memory.software import MemoryStack

REQUIRED_COLUMNS = ("model", "quantity", "memory_value", "unit")
BYTES_OF_UNIT = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "bytes": 1, "b": 1}
# allocated: the peak of torch's allocator. reserved: what it took from the device. total: with the context, as
# nvidia-smi shows. activation_ratio: activations as a share of the same run without sequence parallelism.
# layer_state: the state of the layers' matrices alone, as Korthikanti et al. 2022 draw it.
MemoryKind = Literal["allocated", "reserved", "total", "activations", "state", "layer_state", "activation_ratio"]


class Cells(dict[str, str]):
    """A row's cells by column, lower case; absent columns and blanks alike are empty."""

    def __missing__(self, key: str) -> str:
        return ""


def read_cells(path: Path) -> list[tuple[int, Cells]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in REQUIRED_COLUMNS if name not in header]
            if missing:
                raise ConfigError(
                    f"{path}:1: must have the columns {', '.join(REQUIRED_COLUMNS)}, got no {', '.join(missing)}. "
                    "Pass a table of memory figures."
                )
            rows = []
            line = reader.line_num + 1
            for record in reader:
                if any(cell.strip() for cell in record):
                    cells = {name: cell.strip() for name, cell in zip(header, record, strict=False)}
                    rows.append((line, Cells(cells)))
                line = reader.line_num + 1
            return rows
    except OSError as error:
        raise ConfigError(f"{path}: must be a readable file, got {error.strerror}. Pass a CSV file.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: must be a CSV file in UTF-8, got: {error}. Pass a CSV file.") from error


def read_count(cells: Mapping[str, str], name: str) -> int | None:
    if not cells[name]:
        return None
    try:
        number = float(cells[name])
    except ValueError:
        raise UnpredictableError(f"its {name} must be a whole number, got {cells[name]!r}") from None
    if number < 1 or number != int(number):
        raise UnpredictableError(f"its {name} must be a whole number of at least 1, got {cells[name]!r}")
    return int(number)


def read_measurement(cells: Mapping[str, str], stack: MemoryStack) -> tuple[MemoryKind, float]:
    """(what the figure is, in bytes or as a share)."""
    text = cells["quantity"].lower()
    if "formula" in cells["unit"].lower():
        raise UnpredictableError(f"it is a formula, {cells['memory_value']}, of no run")
    try:
        value = float(cells["memory_value"])
    except ValueError:
        raise UnpredictableError(f"it is no figure but {cells['memory_value']!r}") from None
    if value <= 0:
        raise UnpredictableError(f"its figure must be above 0, got {cells['memory_value']}")
    unit = cells["unit"].lower().split(" ")[0]
    if unit == "%":
        if "activation" not in text or "baseline" not in text:
            raise UnpredictableError(f"a share of what, its quantity {cells['quantity']!r} does not say")
        return "activation_ratio", value / 100
    if unit not in BYTES_OF_UNIT:
        raise UnpredictableError(f"its unit {cells['unit']!r} is not known")
    return _name_kind(text, stack), value * BYTES_OF_UNIT[unit]


def _name_kind(text: str, stack: MemoryStack) -> MemoryKind:
    if "activation" in text:
        return "activations"
    if "optimizer" in text or "model states" in text:
        return stack.state
    if "reserved" in text:
        return "reserved"
    if "smi" in text or "device" in text:
        return "total"
    if "allocated" in text:
        return "allocated"
    return stack.peak
