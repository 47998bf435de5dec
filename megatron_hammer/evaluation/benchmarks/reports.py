"""What `hammer evaluate` prints and writes."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.evaluation.benchmarks.run import Evaluated
from megatron_hammer.evaluation.benchmarks.scores import COLUMNS, list_rows
from megatron_hammer.files.csv_table import format_csv
from megatron_hammer.files.publish import publish_directory
from megatron_hammer.files.tables import build_table, format_markdown_table, open_console
from megatron_hammer.files.typed import replace_non_finite

NUM_TEXT_COLUMNS = 3
FIRST_TOKENS = {"bos": "BOS", "eod": "the end-of-document token", "none": "no token"}


def build_report(evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> dict[str, Any]:
    """Everything but the answers, for JSON: the recipe that gives the scores again, and the scores of each model."""
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "suite": dataclasses.asdict(suite),
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
    """The table, and what must be said beside its numbers."""
    console = open_console()
    console.print(build_table(None, COLUMNS, _list_all_rows(evaluated), num_text=NUM_TEXT_COLUMNS))
    for line in describe_recipe(evaluated, suite):
        console.print(line)


def describe_recipe(evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> list[str]:
    """How the texts began, and what was left out."""
    lines = [f"{model.name}: {model.precision}, before texts: {FIRST_TOKENS[model.bos]}" for model in evaluated]
    if suite.limit is not None:
        lines.append(f"the first {suite.limit} questions of each task: not comparable with published scores")
    version = importlib.metadata.version("lm_eval")
    return [*lines, f"lm-eval {version}; score, standard error (s.e.) and chance in per cent"]


def write_reports(folder: Path, evaluated: Sequence[Evaluated], suite: EvaluationSuite) -> None:
    """scores.json, scores.csv, scores.md and samples.jsonl with every question and answer, in a new folder."""
    rows = _list_all_rows(evaluated)
    samples = [json.dumps(sample, ensure_ascii=False, default=str) for model in evaluated for sample in model.samples]
    table = format_markdown_table(COLUMNS, rows, num_text=NUM_TEXT_COLUMNS)
    with publish_directory(folder) as partial_dir:
        for name, text in {
            "scores.json": json.dumps(build_report(evaluated, suite), indent=2, ensure_ascii=False) + "\n",
            "scores.csv": format_csv(COLUMNS, rows),
            "scores.md": "\n- ".join([table, *describe_recipe(evaluated, suite)]) + "\n",
            "samples.jsonl": "".join(f"{sample}\n" for sample in samples),
        }.items():
            (partial_dir / name).write_text(text, encoding="utf-8")


def _list_all_rows(evaluated: Sequence[Evaluated]) -> list[tuple[str, ...]]:
    return [row for model in evaluated for row in list_rows(model.name, model.scores)]
