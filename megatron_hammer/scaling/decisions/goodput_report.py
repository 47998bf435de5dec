"""The goodput of several layouts: a table for the terminal and the report, sentences, and values for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_hammer.files.typed import replace_non_finite
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.decisions.failures import load_failure_counts
from megatron_hammer.scaling.decisions.goodput import EQUAL_RATIO, SPARES_CONFIDENCE, Goodput, Operations
from megatron_hammer.scaling.report.projection_tables import ResultTable, format_amount
from megatron_hammer.scaling.search.projection import describe_plan

COLUMNS = (
    "row", "GPUs", "between failures", "checkpoint", "save", "stands still", "restart", "--save-interval", "minutes",
    "goodput", "days", "80 % band", "failures", "spare nodes",
)  # fmt: skip


def build_goodput_table(goodputs: Sequence[Goodput], price: float | None) -> ResultTable:
    """One line for each layout that makes progress; those that do not are in list_problems."""
    columns = COLUMNS if price is None else (*COLUMNS, "USD")
    rows = tuple(_build_cells(one, price) for one in goodputs if one.problem is None)
    return ResultTable(
        title="Goodput with failures",
        columns=columns,
        groups=(rows,),
        num_text=1,
        note="between failures: mean time, of a typical cluster. save: until it is complete. restart: detection, "
        "restart and loading. days and band: with failures, over step times, clusters and chance.",
    )


def _build_cells(one: Goodput, price: float | None) -> tuple[str, ...]:
    interval_s = one.save_interval_steps * one.row.step_time_s
    days, band, failures, usd = "", "", "", ""
    if one.days is not None and one.days_interval is not None and one.num_failures is not None:
        days = format_days(one.days)
        band = f"{format_days(one.days_interval.low)} - {format_days(one.days_interval.high)}"
        failures = format_amount(one.num_failures)
        usd = "" if price is None else format_amount(one.days * 24 * one.row.num_gpus * price)
    cells = (
        one.row.row_id,
        f"{one.row.num_gpus:,}",
        format_seconds(one.mtbf_s),
        f"{one.checkpoint_bytes / GIB:,.1f} GiB",
        format_seconds(one.cost.write_s),
        format_seconds(one.cost.stall_s),
        format_seconds(one.cost.down_s),
        f"{one.save_interval_steps:,}",
        format_amount(interval_s / 60),
        f"{one.goodput_ratio:.1%}",
        days,
        band,
        failures,
        str(one.num_spare_nodes),
    )
    return cells if price is None else (*cells, usd)


def format_days(days: float) -> str:
    """A number of days; "never" where a run of that luck does not end."""
    return "never" if days == float("inf") else format_amount(days)


def format_seconds(seconds: float) -> str:
    """A duration in the largest unit that it reaches: 4.2 s, 12 min, 2.3 h, 41 days."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{format_amount(seconds / size)} {unit}"
    return f"{format_amount(seconds)} s"


def describe_flags(one: Goodput, operations: Operations) -> str:
    """What to pass to training, and which other intervals are as good."""
    flags = f"--save-interval {one.save_interval_steps}" + " --async-save" * operations.has_async_save
    low, high = one.equal_steps
    return (
        f"row {one.row.row_id}: pass {flags} ({format_seconds(one.save_interval_steps * one.row.step_time_s)}). "
        f"{low:,} to {high:,} steps make the run at most {EQUAL_RATIO - 1:.1%} longer; keep "
        f"{one.num_spare_nodes:,} spare node{'' if one.num_spare_nodes == 1 else 's'} "
        f"(one is free at {SPARES_CONFIDENCE:.0%} of the failures)."
    )


def list_assumptions(operations: Operations) -> list[str]:
    """Every assumption behind the numbers, with its source."""
    rate = operations.failure_rate
    per_thousand = 1000 * rate.per_gpu_day
    if rate.num_sources:
        names = ", ".join(load_failure_counts())
        origin = f"the geometric mean of {rate.num_sources} published clusters ({names}), whose spread is in the band"
    else:
        origin = "as given, without a spread between clusters"
    storage = operations.storage_bytes_per_s
    bandwidth = (
        "0.12 GB/s for each GPU, as Llama 3's and BLOOM's storage had; pass --storage-gb-per-s of your own"
        if storage is None
        else f"{storage / 1e9:g} GB/s"
    )
    return [
        f"Failures: {per_thousand:.3g} per 1,000 GPUs and day, {origin}. They are independent, and each stops the job.",
        f"Storage: {bandwidth}; the same for saving and loading. Megatron writes the 16-bit weights and Adam's state, "
        "14 bytes per parameter (16 in fp32).",
        f"A failure costs {format_seconds(operations.detection_s)} until it is found, "
        f"{format_seconds(operations.restart_s)} for the restart, loading, and the work since the last complete save.",
        f"Spare nodes: a failure takes a node out for {operations.repair_hours:g} h, which is assumed unless "
        "--repair-hours says otherwise.",
        "Not in it: planned maintenance, evaluation, slow machines that do not fail, and waiting for data.",
    ]


def as_object(goodputs: Sequence[Goodput], operations: Operations, price: float | None) -> dict[str, Any]:
    """Everything for JSON; null for a number that does not exist or is infinite."""
    return {
        "format": "megatron_hammer.scaling.goodput",
        "failures_per_1000_gpu_days": 1000 * operations.failure_rate.per_gpu_day,
        "has_async_save": operations.has_async_save,
        "failure_sources": {name: asdict(count) for name, count in load_failure_counts().items()}
        if operations.failure_rate.num_sources
        else {},
        "assumptions": list_assumptions(operations),
        "rows": [_build_row(one, price) for one in goodputs],
    }


def _build_row(one: Goodput, price: float | None) -> dict[str, Any]:
    values = {
        "id": one.row.row_id,
        "gpus": one.row.num_gpus,
        "layout": describe_plan(one.row.plan),
        "step_time_s": one.row.step_time_s,
        "checkpoint_bytes": one.checkpoint_bytes,
        "save_s": one.cost.write_s,
        "stall_s": one.cost.stall_s,
        "down_s": one.cost.down_s,
        "load_s": one.load_s,
        "mtbf_s": one.mtbf_s,
        "save_interval": one.save_interval_steps,
        "goodput_ratio": one.goodput_ratio,
        "num_spare_nodes": one.num_spare_nodes,
        "ideal_days": one.ideal_days,
        "days": one.days,
        "num_failures": one.num_failures,
        "cost_usd": None if price is None or one.days is None else one.days * 24 * one.row.num_gpus * price,
        "problem": one.problem,
    }
    intervals = {
        "mtbf_s_interval": list(one.mtbf_s_interval),
        "save_interval_interval": list(one.save_interval_steps_interval),
        "equal_save_intervals": list(one.equal_steps),
        "days_interval": None
        if one.days_interval is None
        else [None if day == float("inf") else day for day in one.days_interval],
    }
    return replace_non_finite(values) | intervals
