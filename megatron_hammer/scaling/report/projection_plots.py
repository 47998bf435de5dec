"""Charts of a projection as PNG bytes: scaling with its band, where the time goes, what fills the memory.

The same result gives the same bytes. pyplot is not used, so no display is needed.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.search.projection import (
    MEMORY_NAMES,
    PART_NAMES,
    Projection,
    Study,
    StudyResult,
    estimate_mfu_ratio,
)

DOTS_PER_INCH = 130
CHARACTERS_PER_INCH = 11  # of a title in 11 points, which is at most 12
# Blue to green is compute, warm colours are what the layout adds; the palette is Paul Tol's, safe for the colour-blind.
PART_COLOURS = {
    "matmul_s": "#332288",
    "attention_s": "#4477AA",
    "pointwise_s": "#88CCEE",
    "embedding_and_loss_s": "#44AA99",
    "recompute_s": "#999933",
    "overhead_s": "#777777",
    "tensor_parallel_s": "#EE6677",
    "context_parallel_s": "#AA4499",
    "expert_parallel_s": "#661100",
    "pipeline_p2p_s": "#EE8866",
    "bubble_s": "#DDCC77",
    "data_parallel_s": "#CC3311",
    "optimizer_s": "#117733",
    "jitter_s": "#BBBBBB",
}
MEMORY_COLOURS = ("#332288", "#4477AA", "#88CCEE", "#999933", "#EE8866", "#EE6677", "#AA4499", "#BBBBBB", "#777777")


def draw_plots(result: StudyResult) -> dict[str, bytes]:
    """Every chart by its name. A chart of a single point or bar is left out: the tables say the same."""
    drawn = {}
    if len(_list_best(result)) > 1:
        drawn["scaling"] = _render(_draw_scaling(result))
    if len(_list_bars(result)) > 1:
        drawn |= {"breakdown": _render(_draw_breakdown(result)), "memory": _render(_draw_memory(result))}
    return drawn


def _render(figure: Figure) -> bytes:
    image = io.BytesIO()
    # Without matplotlib's version, which it writes by default, the same result gives the same bytes.
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return image.getvalue()


def _title(result: StudyResult) -> str:
    study = result.study
    machine = study.machine
    return f"{study.model.name} on {machine}, sequence {study.seq_length:,}, {study.precision}"


# --- scaling ---------------------------------------------------------------------------------------------------------


def _draw_scaling(result: StudyResult) -> Figure:
    """Tokens per second over GPUs, with the band and linear scaling; MFU below it; strong beside weak scaling."""
    results = [one for one in (result, result.companion) if one is not None and len(_list_best(one)) > 1]
    results.sort(key=lambda one: one.study.is_weak)
    figure = Figure(figsize=(6.2 * len(results), 7.4), layout="constrained")
    _set_title(figure, _title(result))
    axes = figure.subplots(2, len(results), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, one in enumerate(results):
        one = replace(one, overlay=result.overlay)
        _draw_speed(axes[0][column], one)
        _draw_mfu(axes[1][column], one)
    # Both columns get the same limits, so strong and weak scaling can be compared by eye.
    for row in axes:
        low = min(axis.get_ylim()[0] for axis in row)
        high = max(axis.get_ylim()[1] for axis in row)
        for axis in row:
            axis.set_ylim(low, high)
    return figure


def _describe_batch(result: StudyResult) -> str:
    study = result.study
    if study.samples_per_gpu is not None:
        return f"Weak scaling: {float(study.samples_per_gpu):g} samples per GPU"
    return f"Strong scaling: {study.global_batch_size:,} samples per step"


def _list_best(result: StudyResult) -> list[Projection]:
    """The fastest projection of each size on which something fits, from the smallest size."""
    best = [size.best for size in result.sizes if size.best is not None]
    return sorted(best, key=lambda projection: projection.num_gpus)


def _list_bars(result: StudyResult) -> list[Projection]:
    """What the bars show: the fastest layout of each size, or, of a single size, all of its layouts."""
    best = _list_best(result)
    if len(best) != 1:
        return best
    return [one for size in result.sizes for one in size.projections]


def _name_bars(bars: Sequence[Projection]) -> tuple[str, list[str]]:
    """The axis and its labels: numbers of GPUs, or the rows of a single size."""
    counts = [one.num_gpus for one in bars]
    if len(set(counts)) == len(counts):
        return "GPUs", [f"{count:,}" for count in counts]
    return "row", [f"{count}-{rank}" for rank, count in enumerate(counts, start=1)]


def _set_title(figure: Figure, *lines: str) -> None:
    """A title over the whole figure, folded where it is wider. No word is cut."""
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    figure.suptitle("\n".join(part for line in lines for part in textwrap.wrap(line, width)), fontsize=11)


def _draw_speed(axis: Axes, result: StudyResult) -> None:
    best = _list_best(result)
    counts = [one.num_gpus for one in best]
    speeds = [one.plan.tokens_per_step / one.step.total_s for one in best]
    low = [one.plan.tokens_per_step / one.step.high_s for one in best]
    high = [one.plan.tokens_per_step / one.step.low_s for one in best]
    ideal = [speeds[0] * count / counts[0] for count in counts]
    axis.fill_between(counts, low, high, color="#4477AA", alpha=0.25, linewidth=0, label="80 % band")
    label = f"linear from {counts[0]:,} GPU{'s' if counts[0] > 1 else ''}"
    axis.plot(counts, ideal, color="#777777", linestyle="--", linewidth=1, label=label)
    axis.plot(counts, speeds, color="#332288", marker="o", markersize=4, label="projected, best layout")
    _mark_knee(axis, result, counts, speeds)
    _mark_measured(axis, result)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(_describe_batch(result), fontsize=11)
    axis.set_ylabel("tokens / s")
    axis.yaxis.set_major_formatter(FuncFormatter(_shorten))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axis.legend(loc="upper left", fontsize=9)


def _mark_knee(axis: Axes, result: StudyResult, counts: Sequence[int], values: Sequence[float]) -> None:
    knee = result.knee
    if knee is None or knee.num_gpus_beyond is None or knee.num_gpus not in counts:
        return
    value = values[counts.index(knee.num_gpus)]
    axis.plot(
        [knee.num_gpus], [value], marker="D", markersize=9, color="#CC3311", linestyle="none", label=_knee_label(result)
    )


def _knee_label(result: StudyResult) -> str:
    assert result.knee is not None
    return f"knee: {result.knee.num_gpus:,} GPUs ({result.knee.threshold_ratio:.0%} of the best speed per GPU)"


def _mark_measured(axis: Axes, result: StudyResult) -> None:
    """Mark measured runs. Hollow: with another batch, sequence length or precision than the projection."""
    for is_same, face, words in (
        (True, "#CC3311", "measured"),
        (False, "none", "measured, another batch or precision"),
    ):
        measured = [one.run for one in result.overlay.runs] if result.overlay else []
        runs = [run for run in measured if _is_of(result.study, run.plan) == is_same]
        if runs:
            speeds = [run.plan.tokens_per_step / run.step_time_s for run in runs]
            counts = [run.plan.layout.world_size for run in runs]
            axis.scatter(counts, speeds, marker="s", s=26, facecolors=face, edgecolors="#CC3311", zorder=3, label=words)


def _is_of(study: Study, plan: Plan) -> bool:
    if (plan.seq_length, plan.precision) != (study.seq_length, study.precision):
        return False
    if study.samples_per_gpu is not None:
        return study.samples_per_gpu * plan.layout.world_size == plan.global_batch_size
    return study.global_batch_size == plan.global_batch_size


def _draw_mfu(axis: Axes, result: StudyResult) -> None:
    letter = result.study.mfu_convention
    best = _list_best(result)
    counts = [one.num_gpus for one in best]
    mfu = [estimate_mfu_ratio(one, letter) for one in best]
    low = [ratio * one.step.total_s / one.step.high_s for ratio, one in zip(mfu, best, strict=True)]
    high = [ratio * one.step.total_s / one.step.low_s for ratio, one in zip(mfu, best, strict=True)]
    axis.fill_between(counts, low, high, color="#4477AA", alpha=0.25, linewidth=0)
    axis.plot(counts, mfu, color="#332288", marker="o", markersize=4)
    _mark_knee(axis, result, counts, mfu)
    axis.set_ylabel(f"MFU (convention {letter})")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.set_xlabel("GPUs")
    axis.set_xticks(counts, [f"{count:,}" for count in counts], rotation=45 if len(counts) > 6 else 0)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", color="#DDDDDD", linewidth=0.7)


def _shorten(value: float, _position: Any = None) -> str:
    """1500000 -> 1.5M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# --- bars ------------------------------------------------------------------------------------------------------------


def _draw_breakdown(result: StudyResult) -> Figure:
    """Shares of the step time of each size's fastest layout, stacked, with the step time on top."""
    best = _list_bars(result)
    shares = {PART_NAMES[name]: [getattr(one.step, name) / one.step.total_s for one in best] for name in PART_NAMES}
    colours = {PART_NAMES[name]: colour for name, colour in PART_COLOURS.items()}
    shown = {name: values for name, values in shares.items() if max(values) >= 0.0005}
    figure = Figure(figsize=(max(7.5, 3.6 + 0.75 * len(best)), 5.2), layout="constrained")
    axis = figure.subplots()
    labels = [_format_seconds(one.step.total_s) for one in best]
    _stack_bars(axis, best, shown, colours, labels)
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.set_ylabel("share of the step time")
    _set_title(
        figure, f"Where the time goes: {_title(result)}", f"{_describe_batch(result)}; on each bar the step time"
    )
    return figure


def _draw_memory(result: StudyResult) -> Figure:
    """GiB of the heaviest stage of each size's fastest layout, stacked, against the limit."""
    best = _list_bars(result)
    parts = {name: [getattr(one.memory, field) / GIB for one in best] for field, name in MEMORY_NAMES.items()}
    shown = {name: values for name, values in parts.items() if max(values) > 0}
    colours = dict(zip(parts, MEMORY_COLOURS, strict=True))
    figure = Figure(figsize=(max(7.5, 3.6 + 0.75 * len(best)), 5.2), layout="constrained")
    axis = figure.subplots()
    labels = [f"{one.memory.total_bytes / GIB:.1f}" for one in best]
    _stack_bars(axis, best, shown, colours, labels)
    limit = result.study.memory_limit_bytes / GIB
    axis.axhline(limit, color="#CC3311", linewidth=1.2, label=f"limit {limit:.1f} GiB")
    axis.set_ylim(0, 1.12 * limit)
    axis.set_ylabel("GiB of one GPU")
    _set_title(figure, f"Memory of the heaviest pipeline stage: {_title(result)}")
    _place_legend(axis)
    return figure


def _stack_bars(
    axis: Axes,
    best: Sequence[Projection],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    labels: Sequence[str],
) -> None:
    """One bar per projection, with its parts from the bottom up and its label on top."""
    positions = list(range(len(best)))
    bottoms = [0.0] * len(best)
    for name, values in parts.items():
        axis.bar(
            positions,
            values,
            bottom=bottoms,
            width=0.7,
            color=colours[name],
            edgecolor="white",
            linewidth=0.4,
            label=name,
        )
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    for position, top, label in zip(positions, bottoms, labels, strict=True):
        axis.annotate(
            label,
            (position, top),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
        )
    name, labels_below = _name_bars(best)
    axis.set_xticks(positions, labels_below)
    axis.set_xlabel(name)
    axis.grid(True, axis="y", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    _place_legend(axis)


def _place_legend(axis: Axes) -> None:
    """Beside the bars, in the order in which they are stacked."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)


def _format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
