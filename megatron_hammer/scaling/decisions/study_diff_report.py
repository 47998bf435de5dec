"""The difference of two studies in sentences, tables, JSON, CSV and a chart of both curves."""

import io
import json
from dataclasses import asdict
from typing import Any

from megatron_hammer.files import csv_table
from megatron_hammer.scaling.decisions.study_diff import AbsentRow, SizeChange, StudyDifference
from megatron_hammer.scaling.report.projection_file import SavedRow
from megatron_hammer.scaling.report.projection_tables import ResultTable
from megatron_hammer.scaling.search.projection import describe_plan
from megatron_hammer.scaling.sensitivity.sensitivity_report import format_change

FORMAT = "megatron_hammer.scaling.study_difference"
FORMAT_VERSION = 1
MOST_CHARS = 60  # of a value in the table of inputs; JSON has all of it


def describe_difference(result: StudyDifference) -> list[str]:
    """How the best layouts moved, and notes about the files."""
    common = [size for size in result.sizes if size.time_ratio is not None]
    if result.is_same:
        return ["The studies are the same.", *result.notes]
    sentences = [f"{len(result.inputs)} inputs differ."] if result.inputs else ["No input differs."]
    for size in common:
        layout = "the same layout" if size.is_same_layout else "another layout"
        loss = "" if size.is_same_layout else _describe_loss(size)
        sentences.append(
            f"{size.num_gpus:,} GPUs: {format_change(size.time_ratio)} time per token, with {layout}{loss}."
        )
    sentences += [
        f"{size.num_gpus:,} GPUs: only in the {'second' if size.first is None else 'first'} study."
        for size in result.sizes
        if (size.first is None) != (size.second is None)
    ]
    return [*sentences, *result.notes]


def _describe_loss(size: SizeChange) -> str:
    if size.loss_ratio is None:
        return f"; the old one: {size.kept_problem}"
    return f"; the old one would take {format_change(size.loss_ratio)} there"


def build_tables(result: StudyDifference) -> list[ResultTable]:
    """Every table that has rows; none if the studies are the same."""
    if result.is_same:
        return []
    tables = [
        _build_input_table(result),
        _build_best_table(result),
        _build_pair_table(result),
        _build_absent_table(result),
    ]
    return [table for table in tables if any(table.groups)]


def _build_input_table(result: StudyDifference) -> ResultTable:
    rows = tuple((one.name, _shorten(one.first), _shorten(one.second)) for one in result.inputs)
    return ResultTable(title="Inputs that differ", columns=("input", "first", "second"), groups=(rows,), num_text=3)


def _shorten(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_CHARS else text[: MOST_CHARS - 3] + "..."


def _build_best_table(result: StudyDifference) -> ResultTable:
    rows = tuple(
        (
            f"{size.num_gpus:,}",
            *(_describe_row(row) for row in (size.first, size.second)),
            *("" if row is None else f"{row.step_time_s:.3f}" for row in (size.first, size.second)),
            format_change(size.time_ratio),
            format_change(size.loss_ratio),
        )
        for size in result.sizes
    )
    return ResultTable(
        title="Best layouts",
        columns=("GPUs", "first", "second", "s, first", "s, second", "time per token", "loss if kept"),
        groups=(rows,),
        num_text=3,
        note="loss if kept: how much slower the first study's layout is in the second study than the best one there.",
    )


def _describe_row(row: SavedRow | None) -> str:
    return "none" if row is None else f"{row.row_id}: {describe_plan(row.plan)}"


def _build_pair_table(result: StudyDifference) -> ResultTable:
    rows = tuple(
        (
            describe_plan(pair.first.plan),
            pair.first.row_id,
            pair.second.row_id,
            f"{pair.first.step_time_s:.3f}",
            f"{pair.second.step_time_s:.3f}",
            format_change(pair.time_ratio),
        )
        for pair in result.pairs
    )
    columns = ("layout in both", "first", "second", "s, first", "s, second", "time per token")
    return ResultTable(title="Layouts of both studies", columns=columns, groups=(rows,), num_text=3)


def _build_absent_table(result: StudyDifference) -> ResultTable:
    rows = [("vanished", one) for one in result.vanished] + [("appeared", one) for one in result.appeared]
    return ResultTable(
        title="Layouts of one study",
        columns=("", "row", "layout", "why the other study does not show it"),
        groups=(tuple((word, one.row.row_id, describe_plan(one.row.plan), one.reason) for word, one in rows),),
        num_text=4,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def build_document(result: StudyDifference) -> dict[str, Any]:
    """The difference as plain values for JSON."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "first": str(result.first.path),
        "second": str(result.second.path),
        "is_same": result.is_same,
        "inputs": [asdict(one) for one in result.inputs],
        "sizes": [_build_size(size) for size in result.sizes],
        "rows": list_rows(result),
        "sentences": describe_difference(result),
    }


def _build_size(size: SizeChange) -> dict[str, Any]:
    return {
        "gpus": size.num_gpus,
        "first_row": None if size.first is None else size.first.row_id,
        "second_row": None if size.second is None else size.second.row_id,
        "time_ratio": size.time_ratio,
        "is_same_layout": size.is_same_layout,
        "loss_ratio": size.loss_ratio,
        "kept_problem": size.kept_problem,
    }


def list_rows(result: StudyDifference) -> list[dict[str, Any]]:
    """One flat record for each layout of either study."""
    rows = [
        {
            "status": "both",
            "gpus": pair.first.num_gpus,
            "layout": describe_plan(pair.first.plan),
            "first_row": pair.first.row_id,
            "second_row": pair.second.row_id,
            "first_s": pair.first.step_time_s,
            "second_s": pair.second.step_time_s,
            "time_ratio": pair.time_ratio,
            "reason": None,
        }
        for pair in result.pairs
    ]
    rows += [_build_absent(one, "vanished", "first", "second") for one in result.vanished]
    rows += [_build_absent(one, "appeared", "second", "first") for one in result.appeared]
    return rows


def _build_absent(one: AbsentRow, status: str, own: str, other: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "status": status,
        "gpus": one.row.num_gpus,
        "layout": describe_plan(one.row.plan),
        "first_row": None,
        "second_row": None,
        "first_s": None,
        "second_s": None,
        "time_ratio": None,
        "reason": one.reason,
    }
    return values | {f"{own}_row": one.row.row_id, f"{own}_s": one.row.step_time_s, f"{other}_s": one.step_time_s}


def format_csv(result: StudyDifference) -> str:
    rows = list_rows(result)
    names = list(rows[0]) if rows else ["status"]
    return csv_table.format_csv(names, [[row[name] for name in names] for row in rows])


DOTS_PER_INCH = 130


def draw_curves(result: StudyDifference) -> bytes | None:
    """Tokens per second and GPU of the best layouts with their bands. None if a study has fewer than two sizes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    studies = [
        (words, colour, [row for size in result.sizes if (row := getattr(size, side)) is not None])
        for words, colour, side in (("first", "#4477AA", "first"), ("second", "#EE6677", "second"))
    ]
    if any(len(rows) < 2 for _, _, rows in studies):
        return None
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axis = figure.subplots()
    for words, colour, rows in studies:
        counts = [row.num_gpus for row in rows]
        tokens = [row.plan.tokens_per_step / row.num_gpus for row in rows]
        low = [one / row.high_s for one, row in zip(tokens, rows, strict=True)]
        high = [one / row.low_s for one, row in zip(tokens, rows, strict=True)]
        speeds = [one / row.step_time_s for one, row in zip(tokens, rows, strict=True)]
        axis.fill_between(counts, low, high, color=colour, alpha=0.18, linewidth=0)
        study = (result.first if words == "first" else result.second).study
        name = f"{words}: {study.model.name}, {study.machine}, {study.precision}"
        axis.plot(counts, speeds, color=colour, marker="o", markersize=4, label=name)
    counts = sorted({row.num_gpus for _, _, rows in studies for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens per second and GPU")
    axis.set_title("Best layouts of both studies, with their 80 % bands", fontsize=10)
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.legend(loc="lower left", fontsize=9)
    image = io.BytesIO()
    # Without matplotlib's version, which it writes by default, the same result gives the same bytes.
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return image.getvalue()
