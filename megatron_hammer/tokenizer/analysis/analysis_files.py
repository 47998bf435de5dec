"""An analysis of tokenizers as CSV, one row per tokenizer, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.files.publish import publish_file, publish_files
from megatron_hammer.tokenizer.analysis.analysis_report import describe_tokenizer
from megatron_hammer.tokenizer.analysis.analyze import Analysis
from megatron_hammer.tokenizer.analysis.script import UNITS

CSV_BEGIN = b"name,path,vocab_size,"  # the columns of every analysis, by which an earlier result is known
DOTS_PER_INCH = 120
PANEL_INCHES = (5.6, 4.2)


def write_csv(analysis: Analysis, path: Path) -> None:
    """One row per tokenizer; ratios with six decimals, coverage in percent with two."""
    rows = [_build_row(analysis, describe_tokenizer(analysis, tokenizer)) for tokenizer in analysis.tokenizers]
    publish_files({path: format_csv(list(rows[0]), [list(row.values()) for row in rows])})


def _build_row(analysis: Analysis, described: dict[str, Any]) -> dict[str, Any]:
    row = {name: described[name] for name in ("name", "path", "vocab_size")}
    for level, figures in described.get("coverage", {}).items():
        row[f"coverage_percent {level}"] = f"{100 * figures['covered_ratio']:.2f}"
    if not analysis.scripts:
        return row
    row |= {"documents": analysis.num_documents, "text_bytes": analysis.text_bytes, "reference": analysis.reference}
    row |= _prefix("corpus", described["corpus"])
    for script, figures in described["scripts"].items():
        row |= _prefix(script, {name: value for name, value in figures.items() if name != "fertility_unit"})
    row["changed_documents"] = described["round_trip"]["num_changed_documents"]
    row["losses"] = "; ".join(
        f"{kind}: {loss['num_places']}" for kind, loss in described["round_trip"]["losses"].items()
    )
    return row


def _prefix(prefix: str, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{prefix} {name}": f"{value:.6f}" if isinstance(value, float) else value for name, value in figures.items()
    }


def write_plot(analysis: Analysis, path: Path) -> None:
    """Grouped bars as a PNG, one panel per figure: bytes per token, tokens / reference, fertility, coverage."""
    import matplotlib

    # The backend for files: others look for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _list_panels(analysis)
    names = [_drawable(tokenizer.name) for tokenizer in analysis.tokenizers]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    # An odd number of panels leaves one without content.
    for panel_axes in axes.flat[len(panels) :]:
        panel_axes.set_visible(False)
    for panel_axes, (title, unit, groups, values) in zip(axes.flat, panels, strict=False):
        _draw_bars(panel_axes, groups, names, values)
        panel_axes.set(title=title, ylabel=unit)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)))
    with publish_file(path) as file:
        figure.savefig(file, dpi=DOTS_PER_INCH, format="png")
    pyplot.close(figure)


def _list_panels(analysis: Analysis) -> list[tuple[str, str, list[str], list[list[float]]]]:
    """(title, unit, names of groups, values by tokenizer and group) of each panel that has data."""
    described = [describe_tokenizer(analysis, tokenizer) for tokenizer in analysis.tokenizers]
    panels = []
    if analysis.scripts:
        scripts = [script for script, counts in analysis.scripts.items() if counts.text_bytes]
        groups = ["all", *scripts]
        parts = [[row["corpus"], *(row["scripts"][script] for script in scripts)] for row in described]
        for title, unit, name in (
            ("Bytes a token (more is better)", "UTF-8 bytes / token", "bytes_per_token"),
            ("Tokens needed (less is better)", f"tokens / tokens of {_drawable(analysis.reference)}", "tokens_ratio"),
        ):
            panels.append((title, unit, groups, [[part[name] or 0.0 for part in row] for row in parts]))
        labels = [f"{script}\n(a {UNITS[script]})" for script in scripts]
        fertilities = [[part["fertility"] or 0.0 for part in row[1:]] for row in parts]
        panels.append(("Fertility (less is better)", "tokens / unit", labels, fertilities))
    if coverage := analysis.tokenizers[0].coverage:
        levels = [f"level {number}\n{level.num_characters:,}" for number, level in enumerate(coverage, start=1)]
        covered = [[100 * row.covered_ratio for row in tokenizer.coverage] for tokenizer in analysis.tokenizers]
        panels.append(("Characters with a token of their own", "% of the level's characters", levels, covered))
    return panels


def _draw_bars(axes: Any, groups: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    width = 0.8 / len(names)
    has_labels = len(groups) * len(names) <= 12  # more would overlap
    for number, (name, heights) in enumerate(zip(names, values, strict=True)):
        positions = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(positions, heights, width, label=name)
        if has_labels:
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.1)


def _drawable(text: str) -> str:
    """The text; with escapes for everything that is not ASCII if matplotlib's own font lacks one of its characters."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    if all(ord(character) in glyphs for character in text):
        # matplotlib reads text between two dollar signs as a formula.
        return text.replace("$", r"\$")
    return text.encode("ascii", "backslashreplace").decode("ascii")
