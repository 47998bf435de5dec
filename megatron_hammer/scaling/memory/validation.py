"""Compare the memory model with published figures: a prediction and its error for each row, errors by source and kind.

No solver fits anything, but `PROVENANCE` says which constants were read off which rows, and the report repeats it. Rows
that cannot be predicted are listed with the reason.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from megatron_hammer.model.accounting import StageMemory, estimate_memory
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory.activations import estimate_layer_activations
from megatron_hammer.model.memory.options import Batch
from megatron_hammer.model.memory.state import select_part_sizes
from megatron_hammer.scaling.memory.measured_memory import MeasuredMemory, UnpredictableMemoryRow, read_measured_memory

PROVENANCE = (
    "Workspaces (50 to 107 MiB), the bytes of a logit with native fusion and which gathered tensors meet at the head "
    "were read off rows of SimuMax and of Megatron-LM's tests, the 14 bytes of a logit without fusion and the "
    "fragmentation with expandable segments off torchtitan's rows of 2024, so their errors are those of a fit. Facts "
    "about a source's software come from its repository. All else is counted."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPrediction:
    """One figure and its prediction, in bytes (a ratio for activation_ratio)."""

    row: MeasuredMemory
    predicted: float
    stage: StageMemory  # that the prediction is of

    @property
    def error_ratio(self) -> float:
        return self.predicted / self.row.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorGroup:
    """Errors of a group of rows. Ratios: 0.05 is 5 %."""

    by: str  # source, kind, measured_or_model or all
    name: str
    num_rows: int
    median_absolute_error_ratio: float
    mean_absolute_error_ratio: float
    mean_error_ratio: float
    largest_error_ratio: float  # with its sign
    within_5_percent_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReport:
    rows: tuple[MemoryPrediction, ...]
    unpredictable: tuple[UnpredictableMemoryRow, ...]
    groups: tuple[ErrorGroup, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as plain types: predicted rows, the other rows with the reason, and errors by group."""
        return {
            "rows": [_row_as_json(prediction) for prediction in self.rows],
            "unpredictable": [asdict(row) for row in self.unpredictable],
            "errors": [asdict(group) for group in self.groups],
            "provenance": PROVENANCE,
        }


def validate_memory(path: Path) -> MemoryReport:
    """Predict every row of a table of memory figures. Raises ConfigError for a file that cannot be read."""
    rows, unpredictable = read_measured_memory(path)
    predictions = tuple(predict_memory(row) for row in rows)
    return MemoryReport(rows=predictions, unpredictable=tuple(unpredictable), groups=_group_errors(predictions))


def predict_memory(row: MeasuredMemory) -> MemoryPrediction:
    """The prediction of a row's figure: for the stage that was measured, and for the parts that the figure counts."""
    stages = _estimate(row)
    if row.stage == "first":
        stage = stages[0]
    elif row.stage == "last":
        stage = stages[-1]
    else:
        stage = max(stages, key=lambda candidate: candidate.allocated_bytes)
    return MemoryPrediction(row=row, predicted=_select_figure(row, stage), stage=stage)


def _estimate(row: MeasuredMemory) -> tuple[StageMemory, ...]:
    return estimate_memory(
        row.model,
        row.layout,
        micro_batch_size=row.micro_batch_size,
        seq_length=row.seq_length,
        num_microbatches=row.num_microbatches,
        options=row.options,
        fragmentation_ratio=row.fragmentation_ratio,
    )


def _select_figure(row: MeasuredMemory, stage: StageMemory) -> float:
    """The part of a stage's memory that the row's kind of figure counts."""
    if row.kind == "state":
        return stage.state_bytes
    if row.kind == "layer_state":
        return _count_layer_state(row, stage)
    if row.kind == "activations":  # of the layers, without what recomputing one of them needs
        return stage.num_in_flight * (stage.num_layers // _count_chunks(row)) * _count_kept(row)
    if row.kind == "activation_ratio":
        # A share of the same run without sequence parallelism and recomputation (Korthikanti et al. 2022, figure 7).
        baseline = replace(
            row,
            layout=replace(row.layout, has_sequence_parallel=False),
            options=replace(row.options, recompute="none"),
        )
        return _count_kept(row) / _count_kept(baseline)
    if row.kind == "reserved":
        return stage.allocated_bytes + stage.fragmentation_bytes
    return stage.total_bytes if row.kind == "total" else stage.allocated_bytes


def _count_chunks(row: MeasuredMemory) -> int:
    return row.layout.virtual_pipeline_model_parallel_size


def _count_layer_state(row: MeasuredMemory, stage: StageMemory) -> float:
    """Weights, gradients and optimizer of the linears of a stage's layers, not sharded: 18 bytes per parameter."""
    layer, _, _ = select_part_sizes(row.model, row.layout, row.options.vocab_divisible_by)
    # 12: the fp32 weight and the two moments of Adam, 4 bytes each.
    return stage.num_layers * layer.linear * (row.options.element_bytes + row.options.gradient_bytes + 12)


def _count_kept(row: MeasuredMemory) -> int:
    """Bytes of activations that one layer keeps for one micro-batch."""
    batch = Batch(micro_batch_size=row.micro_batch_size, seq_length=row.seq_length)
    return estimate_layer_activations(row.model, row.layout, batch, row.options).kept


# --- errors ---------------------------------------------------------------------------------------------------------


def _group_errors(predictions: Sequence[MemoryPrediction]) -> tuple[ErrorGroup, ...]:
    keys: tuple[tuple[str, Callable[[MeasuredMemory], str]], ...] = (
        ("source", lambda row: row.source),
        ("kind", lambda row: row.kind),
        ("measured_or_model", lambda row: row.measured_or_model),
        ("all", lambda row: "all"),
    )
    groups = []
    for by, select_name in keys:
        names = dict.fromkeys(select_name(prediction.row) for prediction in predictions)
        for name in names:
            errors = [p.error_ratio for p in predictions if select_name(p.row) == name]
            groups.append(_summarise(by, name, errors))
    return tuple(groups)


def _summarise(by: str, name: str, errors: Sequence[float]) -> ErrorGroup:
    sizes = [abs(error) for error in errors]
    return ErrorGroup(
        by=by,
        name=name,
        num_rows=len(errors),
        median_absolute_error_ratio=statistics.median(sizes),
        mean_absolute_error_ratio=statistics.fmean(sizes),
        mean_error_ratio=statistics.fmean(errors),
        largest_error_ratio=max(errors, key=abs),
        within_5_percent_ratio=sum(size <= 0.05 for size in sizes) / len(sizes),
    )


# --- output ---------------------------------------------------------------------------------------------------------


def _row_as_json(prediction: MemoryPrediction) -> dict[str, Any]:
    row, stage = prediction.row, prediction.stage
    is_share = row.kind == "activation_ratio"
    return {
        "row_number": row.row_number,
        "source": row.source,
        "model": row.name,
        "quantity": row.quantity,
        "kind": row.kind,
        "measured_or_model": row.measured_or_model,
        "unit": "ratio" if is_share else "bytes",
        "measured": row.measured,
        "predicted": prediction.predicted,
        "error_ratio": prediction.error_ratio,
        "pp_rank": stage.pp_rank,
        "parts_bytes": stage.list_parts(),
        "assumptions": list(row.assumptions),
    }


def print_memory_report(report: MemoryReport, stream: IO[str]) -> None:
    """Print predicted rows, other rows, errors by group and the provenance. The last line has the counts."""
    from megatron_hammer.files.tables import build_table, open_console

    console = open_console(stream)
    columns = ("row", "source", "model", "kind", "measured", "predicted", "error")
    console.print(build_table("Rows", columns, map(_list_row_cells, report.rows), num_text=4), "")
    if report.unpredictable:
        reasons = [(str(row.row_number), row.source, row.model or "-", row.reason) for row in report.unpredictable]
        table = build_table("Rows that cannot be predicted", ("row", "source", "model", "reason"), reasons, num_text=4)
        console.print(table, "")
    figures = ("errors by", "name", "rows", "median", "mean", "bias", "largest", "in 5 %")
    console.print(build_table("Errors", figures, map(_list_group_cells, report.groups), num_text=2), "")
    console.print(f"{PROVENANCE}\n", soft_wrap=True)
    total = len(report.rows) + len(report.unpredictable)
    counts = f"{total} rows: {len(report.rows)} predicted, {len(report.unpredictable)} not, each with its reason."
    console.print(counts, soft_wrap=True)


def _list_row_cells(prediction: MemoryPrediction) -> tuple[str, ...]:
    row = prediction.row
    if row.kind == "activation_ratio":
        measured, predicted = f"{row.measured:.1%}", f"{prediction.predicted:.1%}"
    else:
        measured, predicted = f"{row.measured / GIB:.2f} GiB", f"{prediction.predicted / GIB:.2f} GiB"
    error = f"{prediction.error_ratio:+.1%}"
    return str(row.row_number), row.source, row.name, row.kind, measured, predicted, error


def _list_group_cells(group: ErrorGroup) -> tuple[str, ...]:
    return (
        group.by,
        group.name,
        str(group.num_rows),
        f"{group.median_absolute_error_ratio:.1%}",
        f"{group.mean_absolute_error_ratio:.1%}",
        f"{group.mean_error_ratio:+.1%}",
        f"{group.largest_error_ratio:+.1%}",
        f"{group.within_5_percent_ratio:.0%}",
    )
