"""Perplexity tables as Markdown, CSV, JSON and a picture, and the notes that belong to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_hammer.evaluation.perplexity.formula import Estimate, estimate_average, estimate_domain
from megatron_hammer.evaluation.perplexity.measure import DomainScores, ModelScores
from megatron_hammer.evaluation.token_plot import (
    PANEL_INCHES,
    Curve,
    Panel,
    Point,
    draw_panels,
    format_tokens,
    save_png,
)
from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.tables import format_markdown_table
from megatron_hammer.files.typed import replace_non_finite

CSV_COLUMNS = (
    *("model", "trained_tokens", "domain", "perplexity", "perplexity_low", "perplexity_high", "bits_per_byte"),
    *("bits_per_byte_low", "bits_per_byte_high", "nats", "documents", "bytes", "tokens", "reference_tokens", "prefix"),
    *("max_length", "stride", "precision", "documents_without_number"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header and rows of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def build_tables(models: Sequence[ModelScores], reference: str) -> list[Table]:
    """Perplexity as HammerLLM's README prints it, and bits per byte. reference: the path of the tokenizer."""
    names = tuple(domain.name for domain in models[0].domains)
    perplexities, bits = [], []
    for model in models:
        head = (model.name, format_tokens(model.num_trained_tokens))
        domains = [estimate_domain(domain.losses) for domain in model.domains]
        values = [one.perplexity for one in domains] + ([estimate_average(domains)] if len(names) > 1 else [])
        perplexities.append((*head, *(_format(one, 2) for one in values)))
        bits.append((*head, *(_format(one.bits_per_byte, 4) for one in domains)))
    columns = ("model", "tokens", *names)
    average = ("average",) if len(names) > 1 else ()
    return [
        Table(f"perplexity, per token of {reference}", (*columns, *average), tuple(perplexities)),
        Table("bits per byte", columns, tuple(bits)),
    ]


def list_notes(models: Sequence[ModelScores]) -> list[str]:
    """Of what and how the figures were made, which documents have no number, and what each measurement noticed."""
    notes = [domain.note for domain in models[0].domains]
    for model in models:
        windows = f"windows of {model.max_length:,} tokens, stride {model.stride:,}"
        notes.append(f"{model.name}: {model.prefix} in front of each document, {windows}, {model.precision}")
        for domain in model.domains:
            if domain.bad_documents:
                bad = domain.bad_documents
                shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
                notes.append(
                    f"{model.name}: {domain.name} has no figure and is not in the average: the loss is not a finite "
                    f"number at {shown}"
                )
        notes += model.notes
    return notes


def write_report(save_dir: Path, models: Sequence[ModelScores], reference: str) -> list[Path]:
    """Write perplexity.md, .csv, .json and .png at once; returns their paths. Raises OutputError if it cannot."""
    contents: dict[Path, str | bytes] = {
        save_dir / "perplexity.md": format_markdown(build_tables(models, reference), list_notes(models)),
        save_dir / "perplexity.csv": format_csv(CSV_COLUMNS, [[*row.values()] for row in _list_rows(models)]),
        save_dir / "perplexity.json": orjson.dumps(describe(models, reference), option=orjson.OPT_INDENT_2),
        save_dir / "perplexity.png": draw(models),
    }
    publish_files(contents)
    return list(contents)


def format_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Each table under its title, then the notes as a list."""
    lines = []
    for table in tables:
        lines += [f"### {table.title}", "", format_markdown_table(table.columns, table.rows)]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def describe(models: Sequence[ModelScores], reference: str) -> dict[str, Any]:
    """Everything as one JSON object; NaN is null."""
    averages = [
        {"model": model.name}
        | _describe_estimate(estimate_average([estimate_domain(one.losses) for one in model.domains]))
        for model in models
    ]
    notes = list_notes(models)
    return {"reference_tokenizer": reference, "rows": _list_rows(models), "averages": averages, "notes": notes}


def draw(models: Sequence[ModelScores]) -> bytes:
    """A PNG: perplexity against trained tokens for a run with two checkpoints or more, else bits per byte as bars."""
    series = [model for model in models if model.run is not None and model.num_trained_tokens]
    return _draw_series(series, models) if len(series) > 1 else _draw_bars(models)


def _draw_series(series: Sequence[ModelScores], models: Sequence[ModelScores]) -> bytes:
    curves = []
    for number, domain in enumerate(series[0].domains):
        points = []
        for model in series:
            one = estimate_domain(model.domains[number].losses).perplexity
            points.append(Point(model.num_trained_tokens or 0, one.value, one.low, one.high))
        levels = {
            f"{domain.name}, {model.name}": estimate_domain(model.domains[number].losses).perplexity.value
            for model in models
            if model not in series
        }
        curves.append(Curve(label=domain.name, points=points, levels=levels))
    return draw_panels([Panel(unit="perplexity", curves=curves, is_logarithmic=True)])


def _draw_bars(models: Sequence[ModelScores]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(models[0].domains))
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        estimates = [estimate_domain(domain.losses).bits_per_byte for domain in model.domains]
        errors = [[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]]
        axes.bar(places + number * width, [one.value for one in estimates], width, yerr=errors, label=model.name)
    axes.set_xticks(places + 0.4 - width / 2, [domain.name for domain in models[0].domains])
    axes.set_ylabel("bits per byte")
    axes.legend()
    return save_png(figure)


def _list_rows(models: Sequence[ModelScores]) -> list[dict[str, Any]]:
    """A row for every model and domain, by CSV_COLUMNS."""
    cells = [_list_cells(model, domain) for model in models for domain in model.domains]
    return [replace_non_finite(dict(zip(CSV_COLUMNS, row, strict=True))) for row in cells]


def _list_cells(model: ModelScores, domain: DomainScores) -> tuple[Any, ...]:
    estimates, losses = estimate_domain(domain.losses), domain.losses
    figures = [
        value for one in (estimates.perplexity, estimates.bits_per_byte) for value in (one.value, one.low, one.high)
    ]
    sums = (float(losses.nats.sum()), len(losses.nats), int(losses.num_bytes.sum()), domain.num_tokens)
    settings = (model.prefix, model.max_length, model.stride, model.precision, " ".join(domain.bad_documents))
    head = (model.name, model.num_trained_tokens, domain.name)
    return (*head, *figures, *sums, int(losses.num_reference_tokens.sum()), *settings)


def _describe_estimate(one: Estimate) -> dict[str, Any]:
    return replace_non_finite({"perplexity": one.value, "low": one.low, "high": one.high})


def _format(one: Estimate, num_decimals: int) -> str:
    """The figure with its interval, where it has one."""
    if math.isnan(one.low):
        return f"{one.value:.{num_decimals}f}"
    return f"{one.value:.{num_decimals}f} [{one.low:.{num_decimals}f}, {one.high:.{num_decimals}f}]"
