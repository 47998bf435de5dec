"""What `hammer evaluate` prints and writes."""

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.evaluation.benchmarks.run import Evaluated
from megatron_hammer.evaluation.benchmarks.scores import COLUMNS, Score, format_value, is_share, list_rows
from megatron_hammer.evaluation.perplexity.report import list_notes
from megatron_hammer.evaluation.token_plot import Curve, Panel, Point, draw_panels, format_tokens
from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.files.publish import publish_directory
from megatron_hammer.files.tables import build_table, format_markdown_table, open_console
from megatron_hammer.files.typed import replace_non_finite

NUM_TEXT_COLUMNS, NUM_TEXT_COLUMNS_SIDE_BY_SIDE = 4, 2
STANDARD_ERRORS = 1.96  # in half an interval of 95 %
FIRST_TOKENS = {"bos": "BOS", "eod": "the end-of-document token", "none": "no token"}


def build_report(evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> dict[str, Any]:
    """Everything but the answers, for JSON: the recipe that gives the scores again, and the scores of each model."""
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "suite": dataclasses.asdict(suite),
        "notes": describe_recipe(evaluated, suite),
        "models": [
            {
                "name": model.name,
                "precision": model.precision,
                "bos": model.bos,
                "num_trained_tokens": model.num_trained_tokens,
                "scores": [replace_non_finite(dataclasses.asdict(score)) for score in model.scores],
            }
            for model in evaluated
        ],
    }


def print_scores(evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> None:
    """The tables, and what must be said beside their numbers."""
    console = open_console()
    console.print(build_table(None, COLUMNS, _list_all_rows(evaluated), num_text=NUM_TEXT_COLUMNS))
    if len(evaluated) > 1:
        columns, rows = build_comparison(evaluated)
        console.print(build_table("scores of each model", columns, rows, num_text=NUM_TEXT_COLUMNS_SIDE_BY_SIDE))
    for line in describe_recipe(evaluated, suite):
        console.print(line)


def describe_recipe(evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> list[str]:
    """How the texts began, what was left out, and what was noticed."""
    lines = []
    if suite.tasks:  # domains begin otherwise, of which their notes speak
        lines += [
            f"{model.name}: {model.precision}, before questions: {FIRST_TOKENS[model.bos]}" for model in evaluated
        ]
    if suite.limit is not None:
        lines.append(f"the first {suite.limit} questions of each task: not comparable with published scores")
    if texts := [model.texts for model in evaluated if model.texts is not None]:
        lines += [f"perplexity per token of {evaluated[0].reference}", *list_notes(texts)]
    version = importlib.metadata.version("lm_eval")
    return [*lines, f"lm-eval {version}; score, standard error (s.e.) and chance in per cent"]


def write_reports(folder: Path, evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> None:
    """scores.json, scores.csv, scores.md, samples.jsonl with every question and answer, and for a run scores.png; all
    in a new folder.
    """
    samples = [json.dumps(sample, ensure_ascii=False, default=str) for model in evaluated for sample in model.samples]
    table = format_markdown_table(COLUMNS, _list_all_rows(evaluated), num_text=NUM_TEXT_COLUMNS)
    if len(evaluated) > 1:
        table = (
            f"{format_markdown_table(*build_comparison(evaluated), num_text=NUM_TEXT_COLUMNS_SIDE_BY_SIDE)}\n{table}"
        )
    panels = build_panels(evaluated)
    with publish_directory(folder) as partial_dir:
        for name, text in {
            "scores.json": json.dumps(build_report(evaluated, suite), indent=2, ensure_ascii=False) + "\n",
            "scores.csv": format_csv(COLUMNS, _list_all_rows(evaluated, lambda tokens: str(tokens or ""))),
            "scores.md": "\n- ".join([table, *describe_recipe(evaluated, suite)]) + "\n",
            "samples.jsonl": "".join(f"{sample}\n" for sample in samples),
        }.items():
            (partial_dir / name).write_text(text, encoding="utf-8")
        if panels:
            (partial_dir / "scores.png").write_bytes(draw_panels(panels))


def build_comparison(evaluated: Sequence[Evaluated]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table with one row for each model; an average stands for the tasks that it covers."""
    labels = list(dict.fromkeys(label for model in evaluated for label in _list_headlines(model)))
    rows = []
    for model in evaluated:
        found = _list_headlines(model)
        cells = [_format_with_error(found[label]) if label in found else "-" for label in labels]
        rows.append((model.name, format_tokens(model.num_trained_tokens), *cells))
    return ("model", "tokens", *labels), rows


def build_panels(evaluated: Sequence[Evaluated]) -> list[Panel]:
    """Scores against trained tokens; [] unless two checkpoints of a run know theirs.

    Shares have a panel in per cent, and every other metric has its own.
    """
    series = [model for model in evaluated if model.run is not None and model.num_trained_tokens]
    if len(series) < 2:
        return []
    panels: dict[str, Panel] = {}
    for label, first in _list_headlines(series[0]).items():
        unit, factor = ("score in per cent", 100.0) if is_share(first.metric) else (first.metric, 1.0)
        panel = panels.setdefault(unit, Panel(unit=unit, is_logarithmic=unit == "perplexity"))
        chance = None if first.chance is None else factor * first.chance
        points = [_build_point(model, label, factor) for model in series]
        levels = {
            f"{label}, {model.name}": factor * _list_headlines(model)[label].value
            for model in evaluated
            if model not in series
        }
        panel.curves.append(Curve(label=label, points=points, chance=chance, levels=levels))
    return list(panels.values())


def _build_point(model: Evaluated, label: str, factor: float) -> Point:
    score = _list_headlines(model)[label]
    error = math.nan if score.standard_error is None else STANDARD_ERRORS * score.standard_error
    low, high = score.value - error, score.value + error
    return Point(model.num_trained_tokens or 0, factor * score.value, factor * low, factor * high)


def _list_headlines(model: Evaluated) -> dict[str, Score]:
    """By label: the scores that no average covers."""
    return {
        f"{score.task} {score.metric}, {score.num_fewshot}-shot": score for score in model.scores if not score.is_part
    }


def _format_with_error(score: Score) -> str:
    value = format_value(score.metric, score.value)
    if score.standard_error is None:
        return value
    return f"{value} ± {format_value(score.metric, score.standard_error)}"


def _list_all_rows(
    evaluated: Sequence[Evaluated], format_number: Callable[[int | None], str] = format_tokens
) -> list[tuple[str, ...]]:
    return [
        row
        for model in evaluated
        for row in list_rows(model.name, format_number(model.num_trained_tokens), model.scores)
    ]
