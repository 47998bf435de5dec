import csv
import dataclasses
import json
from pathlib import Path

import pytest

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import OutputError
from megatron_hammer.evaluation.benchmarks.reports import build_panels, build_report, print_scores, write_reports
from megatron_hammer.evaluation.benchmarks.run import Evaluated
from megatron_hammer.evaluation.benchmarks.scores import Score

SUITE = EvaluationSuite(tasks=("piqa",), limit=7)
SCORE = Score(task="piqa", metric="acc", num_fewshot=0, value=0.625, standard_error=0.17, chance=0.5, num_questions=8)
EVALUATED = [
    Evaluated(
        name="m@10", precision="fp32", bos="none", num_trained_tokens=320_000, scores=[SCORE], samples=[{"doc": "问"}]
    )
]


def test_every_form_has_the_same_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_reports(tmp_path / "out", EVALUATED, SUITE)
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report == json.loads(json.dumps(build_report(EVALUATED, SUITE)))
    assert report["models"][0]["scores"][0]["value"] == 0.625
    assert report["suite"]["limit"] == 7
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines())
    assert (row["score"], row["chance"], row["questions"], row["tokens"]) == ("62.50", "50.00", "8", "320000")
    markdown = (tmp_path / "out" / "scores.md").read_text()
    assert "| m@10 | 320k | piqa | acc | 0 | 62.50 | 17.00 | 50.00 | 8 | - |" in markdown
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text()) == {"doc": "问"}
    print_scores(EVALUATED, SUITE)
    printed = capsys.readouterr().out
    for text in (markdown, printed):
        assert "before questions: no token" in text
        assert "first 7 questions of each task: not comparable" in text
    assert "62.50" in printed
    assert not (tmp_path / "out" / "scores.png").exists(), "one checkpoint is no series"


def test_checkpoints_of_a_run_have_a_row_each_and_a_picture(tmp_path: Path) -> None:
    law = dataclasses.replace(SCORE, task="law", is_part=True)
    text = dataclasses.replace(SCORE, task="zh", metric="perplexity", value=7.5, standard_error=None, chance=None)
    series = [
        dataclasses.replace(
            EVALUATED[0], name=f"m@{n}", num_trained_tokens=n * 1000, scores=[SCORE, law, text], run="m"
        )
        for n in (10, 20)
    ]
    other = dataclasses.replace(EVALUATED[0], name="hf", num_trained_tokens=None, scores=[SCORE, text])
    write_reports(tmp_path / "out", [*series, other], SUITE)
    markdown = (tmp_path / "out" / "scores.md").read_text()
    assert "| model | tokens | piqa acc, 0-shot | zh perplexity, 0-shot |" in markdown
    assert "| m@20 | 20k | 62.50 ± 17.00 | 7.5000 |" in markdown
    assert "| hf | - | 62.50 ± 17.00 | 7.5000 |" in markdown
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    # Shares, whatever their task, are one picture; a metric with a unit of its own is another.
    panels = build_panels([*series, other])
    assert [(panel.unit, [[*curve.levels] for curve in panel.curves]) for panel in panels] == [
        ("score in per cent", [["piqa acc, 0-shot, hf"]]), ("perplexity", [["zh perplexity, 0-shot, hf"]]),
    ]  # fmt: skip
    # Two models that are no series have no line between them.
    assert build_panels([dataclasses.replace(model, run=None) for model in series]) == []


def test_an_older_report_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_reports(tmp_path, EVALUATED, SUITE)
