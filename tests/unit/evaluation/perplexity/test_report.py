"""Tables, notes and files."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.evaluation.perplexity.formula import DocumentLosses
from megatron_hammer.evaluation.perplexity.measure import DomainScores, ModelScores
from megatron_hammer.evaluation.perplexity.report import draw, write_report


def make_domain(name: str, nats: list[float], bad: tuple[str, ...] = ()) -> DomainScores:
    size = np.full(len(nats), 10)
    losses = DocumentLosses(nats=np.array(nats), num_bytes=2 * size, num_reference_tokens=size)
    return DomainScores(name=name, note=f"{name}: 2 documents", losses=losses, num_tokens=33, bad_documents=bad)


def make_model(name: str, num_trained_tokens: int | None, *domains: DomainScores) -> ModelScores:
    return ModelScores(
        name=name, num_trained_tokens=num_trained_tokens, precision="fp32", prefix="BOS", max_length=80, stride=40,
        domains=domains, notes=(),
    )  # fmt: skip


BAD = make_domain("en", [20.0, math.nan], bad=("en.jsonl:2",))
MODELS = (
    make_model("a|b", 50_000_000_000, make_domain("zh", [20.0, 20.0]), BAD),
    make_model("=c", None, make_domain("zh", [30.0, 10.0]), make_domain("en", [20.0, 20.0])),
)


def test_every_file_has_every_figure_and_names_the_document_without_one(tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new" / "report", MODELS, "ref/tokenizer.json")
    assert [path.suffix for path in paths] == [".md", ".csv", ".json", ".png"]
    markdown = paths[0].read_text()
    assert "| model | tokens | zh | en | average |" in markdown
    assert r"| a\|b | 50B | 7.39 [7.39, 7.39] | nan | 7.39 [7.39, 7.39] |" in markdown
    assert "### perplexity, per token of ref/tokenizer.json" in markdown
    assert "en has no figure and is not in the average: the loss is not a finite number at en.jsonl:2" in markdown
    assert "- zh: 2 documents\n- en: 2 documents\n" in markdown
    assert "BOS in front of each document, windows of 80 tokens, stride 40, fp32" in markdown
    rows = list(csv.DictReader(paths[1].open()))
    assert [(row["model"], row["domain"]) for row in rows] == [
        ("a|b", "zh"),
        ("a|b", "en"),
        ("'=c", "zh"),
        ("'=c", "en"),
    ]
    assert float(rows[0]["perplexity"]) == pytest.approx(math.exp(2))
    assert float(rows[2]["perplexity_low"]) < math.exp(2) < float(rows[2]["perplexity_high"])
    assert (rows[1]["perplexity"], rows[1]["documents_without_number"]) == ("", "en.jsonl:2")
    found = json.loads(paths[2].read_text())
    assert found["rows"][1]["bits_per_byte"] is None
    assert found["rows"][0]["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert [one["model"] for one in found["averages"]] == ["a|b", "=c"]
    assert paths[3].read_bytes().startswith(b"\x89PNG")


def test_checkpoints_of_a_run_are_drawn_against_their_tokens() -> None:
    models = [make_model(f"run@{n}", n * 10**9, make_domain("zh", [20.0 + n, 21.0])) for n in (2, 1)]
    series = [dataclasses.replace(model, run="run") for model in models]
    # The order does not matter for a line; models that are no series are bars beside each other.
    assert draw(series) == draw(series[::-1])
    assert draw(models) != draw(models[::-1])
    assert draw([*series, make_model("hf", None, make_domain("zh", [20.0, 21.0]))]) != draw(series)
