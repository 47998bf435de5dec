"""A validation on a terminal, as JSON and CSV, and as a plot of predicted over measured step times."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any

from megatron_hammer.files import csv_table
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.evidence.layout_ranking import (
    RANKING_TOLERANCE_RATIO,
    Ranking,
    describe_choice,
    summarise_rankings,
)
from megatron_hammer.scaling.evidence.validation import ErrorFigures, Prediction, ValidationReport
from megatron_hammer.scaling.plan import PARTS

DOTS_PER_INCH = 130
FITTED_SENTENCE = (
    "No accuracy is quoted on fitted rows: these coefficients were fitted on them. Pass rows that they have not seen, "
    "or --cross-validate."
)
ROW_COLUMNS = (
    "line", "source", "model", "gpu", "cluster", "gpus", "tp", "pp", "vpp", "cp", "dp", "micro_batch", "global_batch",
    "seq", "precision", "recompute", "sharding", "status", "measured_as", "measured_s", "predicted_s", "low_s",
    "high_s", "error_ratio", "is_in_band", "memory_gib", "is_out_of_memory", *PARTS, "assumptions", "contradictions",
    "reason",
)  # fmt: skip


def list_rows(report: ValidationReport) -> list[dict[str, Any]]:
    """Every row of the table in its order, by ROW_COLUMNS. None if a column does not apply.

    A fitted row has no error_ratio and no is_in_band; an unpredictable row has no predicted values.
    """
    rows = [_describe_prediction(one) for one in report.predictions]
    for row in report.unpredictable:
        facts = {"line": row.row_number, "source": row.source, "model": row.model, "reason": row.reason}
        rows.append(dict.fromkeys(ROW_COLUMNS) | facts | {"status": "unpredictable"})
    return sorted(rows, key=lambda row: row["line"])


def _describe_prediction(one: Prediction) -> dict[str, Any]:
    run, plan, layout = one.run, one.run.plan, one.run.plan.layout
    return dict.fromkeys(ROW_COLUMNS) | {
        "line": run.row_number,
        "source": run.source,
        "model": run.model,
        "gpu": plan.gpu.name,
        "cluster": plan.cluster.name,
        "gpus": layout.world_size,
        "tp": layout.tensor_model_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "vpp": layout.virtual_pipeline_model_parallel_size,
        "cp": layout.context_parallel_size,
        "dp": layout.data_parallel_size,
        "micro_batch": plan.micro_batch_size,
        "global_batch": plan.global_batch_size,
        "seq": plan.seq_length,
        "precision": plan.precision,
        "recompute": plan.recompute,
        "sharding": plan.sharding,
        "status": one.status,
        "measured_as": run.measured_as,
        "measured_s": run.step_time_s,
        "predicted_s": one.step.total_s,
        "low_s": one.step.low_s,
        "high_s": one.step.high_s,
        "error_ratio": one.error_ratio if one.is_counted else None,
        "is_in_band": one.is_in_band if one.is_counted else None,
        "memory_gib": one.memory_bytes / GIB,
        "is_out_of_memory": one.is_out_of_memory,
        **{name: getattr(one.step, name) for name in PARTS},
        "assumptions": list(run.assumptions),
        "contradictions": list(run.contradictions),
    }


def build_validation_document(report: ValidationReport) -> dict[str, Any]:
    """The report as plain types, for JSON."""
    ranking = summarise_rankings(report.rankings)
    return {
        "rows": list_rows(report),
        "errors": {
            dimension: {name: asdict(figures) for name, figures in groups.items()}
            for dimension, groups in report.errors.items()
        },
        "refused": {dimension: dict(groups) for dimension, groups in report.refused.items()},
        "rankings": [
            {
                "source": one.source,
                "job": one.description,
                "num_layouts": one.num_layouts,
                "predicted_best_line": one.predicted_best.row_number,
                "measured_best_line": one.measured_best.row_number,
                "loss_ratio": one.loss_ratio,
            }
            for one in report.rankings
        ],
        "ranking": None if ranking is None else asdict(ranking),
        "summary": {
            "rows": len(report.predictions) + len(report.unpredictable),
            "counted": len(report.counted),
            "fitted": report.num_fitted,
            "unpredictable": len(report.unpredictable),
            "out_of_memory": sum(report.out_of_memory.values()),
        },
        "out_of_memory": dict(report.out_of_memory),
    }


def format_csv(report: ValidationReport) -> str:
    """One line per row of the table, with its assumptions and contradictions in one cell each."""
    rows = list_rows(report)
    for row in rows:
        for name in ("assumptions", "contradictions"):
            row[name] = "; ".join(row[name] or ())
    return csv_table.format_csv(ROW_COLUMNS, [[_format_cell(row[column]) for column in ROW_COLUMNS] for row in rows])


def _format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_report(report: ValidationReport, stream: IO[str]) -> None:
    """Rows, reasons, errors and rankings, and a last line of counts."""
    from megatron_hammer.files.tables import open_console

    console = open_console(stream)
    tables = (
        _build_row_table(report),
        _build_reason_table(report),
        _build_contradiction_table(report),
        *_build_error_tables(report),
    )
    for table in tables:
        if table is not None:
            console.print(table)
            console.print()
    if report.rankings:
        console.print(_build_ranking_table(report.rankings))
        console.print(describe_rankings(report.rankings), markup=False)
        console.print()
    if report.predictions:
        console.print(describe_memory(report), markup=False, soft_wrap=True)
    if report.num_fitted:
        console.print(FITTED_SENTENCE, markup=False)
    console.print(describe_report(report), markup=False, soft_wrap=True)


def describe_report(report: ValidationReport) -> str:
    """The last line: counts of rows, and the error of the Megatron-style rows, which the model describes."""
    num_rows = len(report.predictions) + len(report.unpredictable)
    how = "cross-validated" if any(one.status == "cross-validated" for one in report.predictions) else "predicted"
    counts = (
        f"{num_rows} rows: {len(report.counted)} {how}, {report.num_fitted} fitted, "
        f"{len(report.unpredictable)} unpredictable"
    )
    if not report.counted:
        return counts
    style, figures = next(iter(report.errors["software"].items()))  # Megatron-style before other software
    return (
        f"{counts}; {figures.num_rows} of {style}: median error {figures.median_absolute_ratio:.1%}, "
        f"mean {figures.mean_absolute_ratio:.1%}, bias {figures.bias_ratio:+.1%}, "
        f"{figures.band_coverage_ratio:.0%} in the band"
    )


def describe_memory(report: ValidationReport) -> str:
    """How many rows ran although their own plan would be out of memory, by source."""
    by_source = report.out_of_memory
    if not by_source:
        return f"None of the {len(report.predictions)} plans would be out of memory."
    listed = ", ".join(f"{source} {number}" for source, number in sorted(by_source.items()))
    counts = f"{sum(by_source.values())} of {len(report.predictions)} plans"
    return f"{counts} would be out of memory although they ran, marked M: {listed}."


def describe_rankings(rankings: Sequence[Ranking]) -> str:
    """The regret of following the prediction, in a sentence; the rankings must not be empty."""
    summary = summarise_rankings(rankings)
    assert summary is not None
    return (
        f"{summary.num_groups} jobs in several layouts: the layout predicted best is {summary.mean_loss_ratio:.1%} "
        f"slower than the measured best on average and {summary.worst_loss_ratio:.1%} at worst; in "
        f"{summary.num_within_5_percent} jobs it is within {RANKING_TOLERANCE_RATIO:.0%}"
    )


def _build_row_table(report: ValidationReport) -> Any:
    if not report.predictions:
        return None
    table = _build_table(
        "Rows", ("line", "source", "model", "GPUs", "layout", "batch"), ("measured", "predicted", "band", "error")
    )
    for one in report.predictions:
        run, plan, layout = one.run, one.run.plan, one.run.plan.layout
        error = f"{one.error_ratio:+.1%}" + ("" if one.is_in_band else " !") if one.is_counted else "fitted"
        error += " M" if one.is_out_of_memory else ""
        table.add_row(
            str(run.row_number),
            run.source,
            run.model,
            f"{layout.world_size} {plan.gpu.name} {plan.precision}",
            _describe_layout(layout),
            f"{plan.global_batch_size}/{plan.micro_batch_size}",
            f"{run.step_time_s:.4g} s",
            f"{one.step.total_s:.4g} s",
            f"{one.step.low_s:.4g}-{one.step.high_s:.4g}",
            error,
        )
    table.caption = (
        "batch: global/micro; !: the measured time lies outside the band; M: the plan would be out of memory"
    )
    return table


def _describe_layout(layout: ParallelLayout) -> str:
    words = (
        f"TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size}"
        f"x{layout.virtual_pipeline_model_parallel_size} CP{layout.context_parallel_size} "
        f"DP{layout.data_parallel_size}"
    )
    return f"{words} EP{layout.expert_model_parallel_size}" if layout.expert_model_parallel_size > 1 else words


def _build_reason_table(report: ValidationReport) -> Any:
    if not report.unpredictable:
        return None
    table = _build_table("Rows that cannot be predicted", ("line", "source", "model", "reason"), ())
    for row in report.unpredictable:
        table.add_row(str(row.row_number), row.source, row.model, row.reason)
    return table


def _build_contradiction_table(report: ValidationReport) -> Any:
    rows = [(one.run, sentence) for one in report.predictions for sentence in one.run.contradictions]
    if not rows:
        return None
    table = _build_table("Rows whose cells contradict each other", ("line", "source", "model", "cells"), ())
    for run, sentence in rows:
        table.add_row(str(run.row_number), run.source, run.model, sentence)
    return table


def _build_error_tables(report: ValidationReport) -> list[Any]:
    tables = []
    for dimension, groups in report.errors.items():
        refused = report.refused.get(dimension, {})
        if not groups and not refused:
            continue
        title = "Errors of the step time" if dimension == "all" else f"Errors by {dimension}"
        # A column only where it is known of refused rows: the GPU or the precision may be what they lack.
        columns = ("rows", *(["refused"] if refused else []), "median", "mean", "bias", "in the band")
        table = _build_table(title, (dimension,), columns)
        for name in dict.fromkeys([*groups, *refused]):
            num_rows, *figures = format_figures(groups[name]) if name in groups else ("0", *"----")
            table.add_row(name, num_rows, *([str(refused.get(name, 0))] if refused else []), *figures)
        tables.append(table)
    return tables


def format_figures(figures: ErrorFigures) -> tuple[str, ...]:
    """Rows, median, mean, bias and the share in the band, as the tables show them."""
    return (
        str(figures.num_rows),
        f"{figures.median_absolute_ratio:.1%}",
        f"{figures.mean_absolute_ratio:.1%}",
        f"{figures.bias_ratio:+.1%}",
        f"{figures.band_coverage_ratio:.0%}",
    )


def _build_ranking_table(rankings: Sequence[Ranking]) -> Any:
    table = _build_table(
        "Ranking of layouts", ("source", "job", "predicted best", "measured best"), ("layouts", "slower by")
    )
    for one in rankings:
        table.add_row(
            one.source,
            one.description,
            f"line {one.predicted_best.row_number}: {describe_choice(one.predicted_best.plan)}",
            f"line {one.measured_best.row_number}: {describe_choice(one.measured_best.plan)}",
            str(one.num_layouts),
            f"{one.loss_ratio:.1%}",
        )
    return table


def _build_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Any:
    from megatron_hammer.files.tables import build_table

    return build_table(title, (*texts, *numbers), (), num_text=len(texts))


def draw_scatter(report: ValidationReport) -> bytes | None:
    """A PNG of predicted over measured step times, one colour per source family. None if no row counts."""
    if not report.counted:
        return None
    from matplotlib.figure import Figure

    families: dict[str, list[Prediction]] = {}
    for one in report.counted:
        families.setdefault(one.run.source_family or "unnamed", []).append(one)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for position, (family, group) in enumerate(sorted(families.items())):
        measured = [one.run.step_time_s for one in group]
        predicted = [one.step.total_s for one in group]
        marker = "osD^vP*X"[position // 10 % 8]
        fill = f"C{position % 10}" if group[0].run.is_megatron_style else "none"
        axes.plot(
            measured, predicted, marker, color=f"C{position % 10}", markerfacecolor=fill, markersize=4, label=family
        )
    times = [time for one in report.counted for time in (one.run.step_time_s, one.step.total_s)]
    ends = (min(times) / 1.3, max(times) * 1.3)
    axes.plot(ends, ends, color="black", linewidth=0.8)
    for ratio in (0.9, 1.1):
        axes.plot(ends, [ratio * end for end in ends], color="black", linewidth=0.6, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured step time (s)", ylabel="predicted step time (s)")
    title = f"{len(report.counted)} runs, none fitted on; hollow: other software than Megatron; dashed: 10 % off"
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, which="major", linewidth=0.3)
    axes.legend(fontsize=6, loc="upper left")
    image = io.BytesIO()
    # By default matplotlib writes its version into a PNG. Without it, the same figures give the same bytes.
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return image.getvalue()
