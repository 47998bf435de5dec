"""A sensitivity study in sentences, a table, JSON, CSV and a tornado chart."""

import io
from typing import Any

from megatron_hammer.files import csv_table
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.report.projection_tables import ResultTable
from megatron_hammer.scaling.search.projection import describe_plan
from megatron_hammer.scaling.sensitivity.sensitivity import Outcome, Sensitivity
from megatron_hammer.scaling.sensitivity.variations import QUANTITIES

FORMAT = "megatron_hammer.scaling.sensitivity"
FORMAT_VERSION = 1
SMALL_LOSS_RATIO = 0.01  # a layout that is slower by less is as good: predictions do not tell them apart
RANK_NOTE = (
    "time, GPU time: per token, against the base; the layout is chosen anew. kept: the time with the base's layout. "
    "place: of the base's layout among the best ones found. rank corr.: Kendall's tau-b of the base's best layouts "
    "before and after; 1 means that their order stays."
)


def describe_sensitivity(result: Sensitivity) -> list[str]:
    """What matters most, whether the best layout stays good, and what could not be varied."""
    done = [one for one in result.outcomes if one.time_ratio is not None]
    sentences = []
    if done:
        most = sorted(done, key=lambda one: -abs(one.gpu_time_ratio or 0.0))[:3]
        words = ", ".join(f"{one.variation.label} ({format_change(one.gpu_time_ratio)})" for one in most)
        sentences.append(f"GPU time per token changes most with: {words}.")
        sentences.append(_describe_layout(done))
    sentences += [f"{one.variation.label}: {one.problem}" for one in result.outcomes if one.problem is not None]
    return sentences


def format_change(ratio: float | None) -> str:
    """+1.2%; 0.0% without a sign, and nothing for None."""
    if ratio is None:
        return ""
    return "0.0%" if abs(ratio) < 0.0005 else f"{ratio:+.1%}"


def _describe_layout(done: list[Outcome]) -> str:
    lost = [one.variation.label for one in done if one.kept is None]
    losses = [one for one in done if (one.loss_ratio or 0.0) > SMALL_LOSS_RATIO]
    sentence = f"The best layout stays within {SMALL_LOSS_RATIO:.0%} of the best one under every change"
    if losses:
        worst = max(losses, key=lambda one: one.loss_ratio or 0.0)
        sentence = (
            f"The best layout is more than {SMALL_LOSS_RATIO:.0%} slower than the new best one under {len(losses)} of "
            f"{len(done)} changes, at most {worst.loss_ratio:.1%} ({worst.variation.label})"
        )
    elif lost:
        sentence += " that it fits in"
    return f"{sentence}. It does not fit or start with: {', '.join(lost)}." if lost else f"{sentence}."


def build_table(result: Sensitivity) -> ResultTable:
    best = result.base.best
    assert best is not None
    study = result.case.study
    rows = [
        ("(base)", "", "", "", f"{best.step.total_s:.3f}", "", "", "", f"{best.memory.total_bytes / GIB:.1f}",
         describe_plan(best.plan)),
        *(_build_cells(one) for one in result.outcomes if one.best is not None),
    ]  # fmt: skip
    columns = ("change", "time", "GPU time", "kept", "s per step", "place", "loss if kept", "rank corr.", "GiB")
    return ResultTable(
        title=f"{study.model.name} on {result.case.num_gpus:,} x {study.machine}, "
        f"{study.precision}: one change at a time",
        columns=(*columns, "fastest layout"),
        groups=(tuple(rows),),
        num_text=1,
        note=RANK_NOTE,
    )


def _build_cells(one: Outcome) -> tuple[str, ...]:
    assert one.best is not None
    kept = "does not fit" if one.kept is None else format_change(one.kept_time_ratio)
    place = "" if one.kept is None else "lower" if one.place is None else str(one.place)
    return (
        one.variation.label,
        format_change(one.time_ratio),
        format_change(one.gpu_time_ratio),
        kept,
        f"{one.best.step.total_s:.3f}",
        place,
        "" if one.loss_ratio is None else f"{one.loss_ratio:.1%}",
        "" if one.rank_correlation is None else f"{one.rank_correlation:.2f}",
        f"{one.best.memory.total_bytes / GIB:.1f}",
        describe_plan(one.best.plan),
    )


def build_document(result: Sensitivity) -> dict[str, Any]:
    """The study as plain values for JSON."""
    study, best = result.case.study, result.base.best
    assert best is not None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model.name,
        "gpu": study.gpu.name,
        "cluster": study.cluster.name,
        "gpus": result.case.num_gpus,
        "precision": study.precision,
        "seq_length": study.seq_length,
        "global_batch_size": result.base.global_batch_size,
        "num_layouts": len(result.base.projections),
        "base": {"layout": describe_plan(best.plan), "step_time_s": best.step.total_s},
        "outcomes": [_build_outcome(one) for one in result.outcomes],
        "sentences": describe_sensitivity(result),
    }


def _build_outcome(one: Outcome) -> dict[str, Any]:
    return {
        "quantity": one.variation.name,
        "change": one.variation.change,
        "problem": one.problem,
        "gpus": one.num_gpus,
        "time_ratio": one.time_ratio,
        "gpu_time_ratio": one.gpu_time_ratio,
        "kept_time_ratio": one.kept_time_ratio,
        "loss_ratio": one.loss_ratio,
        "place": one.place,
        "rank_correlation": one.rank_correlation,
        "step_time_s": None if one.best is None else one.best.step.total_s,
        "memory_bytes": None if one.best is None else one.best.memory.total_bytes,
        "layout": None if one.best is None else describe_plan(one.best.plan),
    }


def format_csv(result: Sensitivity) -> str:
    rows = [_build_outcome(one) for one in result.outcomes]
    names = list(rows[0])
    return csv_table.format_csv(names, [[row[name] for name in names] for row in rows])


# --- the chart -------------------------------------------------------------------------------------------------------

SLOWER, FASTER = "#CC6677", "#4477AA"  # of Paul Tol's palette, safe for the colour-blind
LEAST_MARKED_RATIO = 1e-3
DOTS_PER_INCH = 130


def draw_tornado(result: Sensitivity) -> bytes | None:
    """A bar for each change, the quantities that matter most on top, as PNG. None with fewer than two bars."""
    from matplotlib.figure import Figure

    bars = _list_bars(result)
    if len(bars) < 2:
        return None
    figure = Figure(figsize=(9.6, 2.0 + 0.3 * len(bars)), layout="constrained")
    axis = figure.subplots()
    marks = []
    for position, one in enumerate(bars):
        ratio = one.gpu_time_ratio or 0.0
        axis.barh(position, ratio, height=0.72, color=SLOWER if ratio > 0 else FASTER)
        ends = [ratio, 0.0]
        if (one.loss_ratio or 0.0) > LEAST_MARKED_RATIO:
            # The layout of the base loses the same share of the time and of the GPU time.
            ends.append((1 + ratio) * (1 + (one.loss_ratio or 0.0)) - 1)
            marks.append((ends[-1], position))
        # The label stands beyond everything on its side.
        end, offset, alignment = (max(ends), 7, "left") if ratio >= 0 else (min(ends), -7, "right")
        axis.annotate(
            format_change(ratio), (end, position), xytext=(offset, 0), textcoords="offset points", va="center",
            ha=alignment, fontsize=8,
        )  # fmt: skip
    if marks:
        axis.plot(
            *zip(*marks, strict=True), marker="D", markersize=5, markerfacecolor="white", color="#222222",
            linestyle="none", label="with the base's layout",
        )  # fmt: skip
        axis.legend(loc="lower right", fontsize=8)
    _label_axes(axis, result, bars)
    image = io.BytesIO()
    # Without matplotlib's version, which it writes by default, the same result gives the same bytes.
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return image.getvalue()


def _list_bars(result: Sensitivity) -> list[Outcome]:
    """From the bottom up: quantities by their largest change, and the changes of one quantity together."""
    groups: dict[str, list[Outcome]] = {}
    for one in result.outcomes:
        if one.gpu_time_ratio is not None:
            groups.setdefault(one.variation.name, []).append(one)
    ordered = sorted(groups.values(), key=lambda group: max(abs(one.gpu_time_ratio or 0.0) for one in group))
    return [one for group in ordered for one in reversed(group)]


def _label_axes(axis: Any, result: Sensitivity, bars: list[Outcome]) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_yticks(range(len(bars)), [_label_bar(one) for one in bars], fontsize=8)
    axis.axvline(0, color="#222222", linewidth=0.8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}%" if value else "0%"))
    axis.margins(x=0.14, y=0.02)
    axis.set_xlabel("change of the GPU time per token, with the layout chosen anew")
    axis.grid(True, axis="x", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    study = result.case.study
    machine = f"{result.case.num_gpus:,} x {study.machine}"
    axis.set_title(f"{study.model.name} on {machine}, {study.precision}:\none change at a time", fontsize=10)


def _label_bar(one: Outcome) -> str:
    mark = "" if one.kept is not None else " (layout must change)"
    return f"{QUANTITIES[one.variation.name].words} {one.variation.change}{mark}"
