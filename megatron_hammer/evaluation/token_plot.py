"""Scores of the checkpoints of a run against the tokens that they were trained on, as a PNG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PLOT_DOTS_PER_INCH = 120
PANEL_INCHES = 8, 5
BAND_OPACITY = 0.4  # of all intervals together


@dataclass(frozen=True, slots=True)
class Point:
    """low, high: the interval of the value; NaN where it has none."""

    num_tokens: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """chance: the score of guessing; None where it has none. levels: by label, values of models that are no part of the
    run.
    """

    label: str
    points: Sequence[Point]
    chance: float | None = None
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Curves of one unit."""

    unit: str
    curves: list[Curve] = field(default_factory=list)
    is_logarithmic: bool = False


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """A PNG with the panels below each other."""
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for curve in panel.curves:
            points = sorted(curve.points, key=lambda point: point.num_tokens)
            tokens = [point.num_tokens for point in points]
            (line,) = axes.plot(tokens, [point.value for point in points], marker="o", label=curve.label)
            lows, highs = [point.low for point in points], [point.high for point in points]
            axes.fill_between(tokens, lows, highs, color=line.get_color(), alpha=BAND_OPACITY / len(panel.curves))
            if curve.chance is not None:
                axes.axhline(curve.chance, color=line.get_color(), linestyle=":", linewidth=1)
            for label, value in curve.levels.items():
                axes.axhline(value, color=line.get_color(), linestyle="--", linewidth=1, label=label)
        axes.set(xlabel="trained tokens", ylabel=panel.unit, yscale="log" if panel.is_logarithmic else "linear")
        axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the axes: there may be many
    return save_png(figure)


def save_png(figure: Any) -> bytes:
    """A PNG without matplotlib's version, so that the same figure has the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=PLOT_DOTS_PER_INCH, metadata={"Software": None})
    return content.getvalue()


def format_tokens(num_tokens: int | None) -> str:
    """50B, 1.3M or 820; a hyphen where it is not known."""
    if num_tokens is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if num_tokens >= size:
            return f"{num_tokens / size:.4g}{unit}"
    return str(num_tokens)
