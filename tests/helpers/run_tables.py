"""Small tables of invented runs under the published header, for tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs

COLUMNS = (
    *("source", "model", "params_B", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus"),
    *("gpu_type", "tp", "pp", "vpp", "cp", "dp", "micro_batch", "global_batch", "precision", "recompute"),
    *("iteration_time_s", "tflops_per_gpu", "mfu", "tokens_per_s_per_gpu", "sharding", "mfu_definition"),
    *("derived_fields", "provenance", "notes"),
)

# A run of a team that is not known: every cell that the reader needs, invented.
COMPLETE = {
    "source": "team_a",
    "model": "GPT-tiny",
    "layers": "24",
    "hidden": "2048",
    "heads": "16",
    "kv_heads": "16",
    "ffn": "8192",
    "vocab": "51200",
    "seq": "2048",
    "gpus": "16",
    "gpu_type": "H100",
    "tp": "2",
    "pp": "1",
    "cp": "1",
    "dp": "8",
    "micro_batch": "2",
    "global_batch": "64",
    "precision": "bf16",
    "recompute": "none",
    "iteration_time_s": "0.7",
    "sharding": "distributed optimizer",
}


def write_table(path: Path, *rows: dict[str, str], columns: Sequence[str] = COLUMNS) -> Path:
    """Rows of cells by column, blank where not given, each over COMPLETE."""
    lines = [",".join(columns)]
    for row in rows:
        cells = COMPLETE | row
        lines.append(",".join('"' + cells.get(column, "").replace('"', '""') + '"' for column in columns))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_one(folder: Path, **cells: str) -> MeasuredRun:
    """The run of a table of one row, which must be predictable."""
    runs, unpredictable = read_runs(write_table(folder / "one.csv", cells))
    assert unpredictable == []
    return runs[0]


def read_plan(folder: Path, **cells: str) -> Plan:
    return read_one(folder, **cells).plan
