"""How long documents are: counts by length in bins that grow by a constant factor, as a table and as a picture."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.files.publish import publish_files

CSV_COLUMNS = ("min_tokens", "max_tokens", "documents", "tokens")
CSV_HEADER = ",".join(CSV_COLUMNS).encode()  # by which an earlier result is known
PLOT_BINS_PER_OCTAVE = 4
PLOT_INCHES = (9.0, 6.5)
PLOT_DOTS_PER_INCH = 120
LOG_SCALE_RATIO = 50


@dataclass(frozen=True, slots=True)
class LengthHistogram:
    """Documents, and the tokens in them, of lengths edges[k] up to but not including edges[k + 1].

    edges: int64 [bins + 1] in tokens; num_documents, num_tokens: int64 [bins]. The first bin is that of length 0.
    """

    edges: np.ndarray
    num_documents: np.ndarray
    num_tokens: np.ndarray


def build_histogram(lengths: np.ndarray, bins_per_octave: int = 1) -> LengthHistogram:
    """Count lengths, int64 [n], in bins that double after every `bins_per_octave`, up to the longest."""
    num_octaves = max(int(lengths.max(initial=0)), 1).bit_length()
    steps = np.arange(num_octaves * bins_per_octave + 1) / bins_per_octave
    # ceil gives the same edge twice for small lengths, where a step is less than one token.
    edges = np.unique(np.concatenate(([0], np.ceil(2.0**steps)))).astype(np.int64)
    last = int(np.searchsorted(edges, lengths.max(initial=0), side="right"))
    edges = edges[: last + 1]
    bins = np.searchsorted(edges, lengths, side="right") - 1
    num_documents = np.bincount(bins, minlength=len(edges) - 1)
    num_tokens = np.zeros(len(edges) - 1, dtype=np.int64)
    # add.at and not +=, which would count a bin once however many lengths fall into it.
    np.add.at(num_tokens, bins, lengths)
    return LengthHistogram(edges, num_documents, num_tokens)


def write_histogram_csv(path: Path, histogram: LengthHistogram) -> None:
    """Write a row for each bin: the least and the largest length in it, documents, tokens."""
    columns = (histogram.edges[:-1], histogram.edges[1:] - 1, histogram.num_documents, histogram.num_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    publish_files({path: format_csv(CSV_COLUMNS, rows)})


def plot_histogram(path: Path, lengths: np.ndarray, title: str) -> None:
    """Draw documents and tokens by length as a PNG; lengths: int64 [n], in tokens, at least one.

    The axis of lengths is logarithmic; that of documents is where the fullest bin dwarfs the emptiest.
    """
    import matplotlib

    # The backend for files: others look for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    histogram = build_histogram(lengths, PLOT_BINS_PER_OCTAVE)
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=PLOT_INCHES, layout="constrained")
    # Length 0 has no place on a logarithmic axis; its bar takes the octave before 1.
    edges = histogram.edges.astype(np.float64)
    edges[0] = 0.5
    for axes, values, label in ((upper, histogram.num_documents, "documents"), (lower, histogram.num_tokens, "tokens")):
        axes.bar(
            edges[:-1], values, width=np.diff(edges), align="edge", color="#4c72b0", edgecolor="white", linewidth=0.4
        )
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(axis="y", alpha=0.3)
    filled = histogram.num_documents[histogram.num_documents > 0]
    if len(filled) and filled.max() > LOG_SCALE_RATIO * filled.min():
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _mark_quantiles((upper, lower), lengths)
    lower.set_xscale("log", base=2)
    lower.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_format_length))
    lower.set_xlim(left=edges[int((histogram.num_documents > 0).argmax())])
    lower.set_xlabel("tokens of a document" + (" (left of 1: empty)" if histogram.num_documents[0] else ""))
    upper.set_title(title)
    content = io.BytesIO()
    # Without the version of matplotlib in it: the same data gives the same bytes.
    figure.savefig(content, format="png", dpi=PLOT_DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(figure)
    publish_files({path: content.getvalue()})


def _mark_quantiles(panels: tuple, lengths: np.ndarray) -> None:
    if not len(lengths):
        return
    styles = {"median": (0.5, "-"), "p90": (0.9, "--"), "p99": (0.99, ":")}
    for name, (share, style) in styles.items():
        value = int(np.quantile(lengths, share, method="inverted_cdf"))
        for axes in panels:
            axes.axvline(max(value, 0.7), color="#c44e52", linestyle=style, linewidth=1.2, label=f"{name} {value:,}")
    panels[0].legend(frameon=False)


def _format_length(value: float, _: object) -> str:
    if value < 1:
        return "0"
    power = math.log2(value)
    return f"{round(value / 1024):,}k" if value >= 1024 and power == int(power) else f"{value:,.0f}"
