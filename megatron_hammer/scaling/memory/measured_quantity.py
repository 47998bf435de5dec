"""What the figure of a row of a memory table counts, and its value."""

from typing import Literal

from megatron_hammer.scaling.memory.software import MemorySoftware
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.run_table import MemoryRow

BYTES_OF_UNIT = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "bytes": 1, "b": 1}
# allocated: the peak of torch's allocator. reserved: what the allocator took from the device. total: with the CUDA
# context, as nvidia-smi shows. activation_ratio: activations relative to the same run without sequence parallelism.
# layer_state: weights, gradients and optimizer of the layers' matrices only, as in figure 1 of Korthikanti et al. 2022.
MemoryKind = Literal["allocated", "reserved", "total", "activations", "state", "layer_state", "activation_ratio"]


def read_measurement(row: MemoryRow, software: MemorySoftware) -> tuple[MemoryKind, float]:
    """(kind of figure, value in bytes or as a ratio). Raises UnpredictableError for a formula or an unknown unit."""
    text = row.quantity.lower()
    if "formula" in row.unit.lower():
        raise UnpredictableError(f"it is a formula, {row.memory_value}, of no run")
    try:
        value = float(row.memory_value)
    except ValueError:
        raise UnpredictableError(f"it is no figure but {row.memory_value!r}") from None
    if value <= 0:
        raise UnpredictableError(f"its figure must be above 0, got {row.memory_value}")
    unit = row.unit.lower().split(" ")[0]
    if unit == "%":
        if "activation" not in text or "baseline" not in text:
            raise UnpredictableError(f"a share of what, its quantity {row.quantity!r} does not say")
        return "activation_ratio", value / 100
    if unit not in BYTES_OF_UNIT:
        raise UnpredictableError(f"its unit {row.unit!r} is not known")
    return _name_kind(text, software), value * BYTES_OF_UNIT[unit]


def _name_kind(text: str, software: MemorySoftware) -> MemoryKind:
    if "activation" in text:
        return "activations"
    if "optimizer" in text or "model states" in text:
        return software.state
    if "reserved" in text:
        return "reserved"
    if "smi" in text or "device" in text:
        return "total"
    if "allocated" in text:
        return "allocated"
    return software.peak
