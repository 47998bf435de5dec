import csv
import json
from pathlib import Path

import pytest

from megatron_hammer.config.evaluation_suite import EvaluationSuite
from megatron_hammer.errors import OutputError
from megatron_hammer.evaluation.benchmarks.reports import build_report, print_scores, write_reports
from megatron_hammer.evaluation.benchmarks.run import Evaluated
from megatron_hammer.evaluation.benchmarks.scores import Score

SUITE = EvaluationSuite(tasks=("piqa",), limit=7)
SCORE = Score(task="piqa", metric="acc", num_fewshot=0, value=0.625, standard_error=0.17, chance=0.5, num_questions=8)
EVALUATED = [
    Evaluated(
        name="m@10", precision="fp32", bos="none", num_trained_tokens=320, scores=[SCORE], samples=[{"doc": "问"}]
    )
]


def test_every_form_has_the_same_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_reports(tmp_path / "out", EVALUATED, SUITE)
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report == json.loads(json.dumps(build_report(EVALUATED, SUITE)))
    assert report["models"][0]["scores"][0]["value"] == 0.625
    assert report["suite"]["limit"] == 7
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines())
    assert (row["score"], row["chance"], row["questions"]) == ("62.50", "50.00", "8")
    markdown = (tmp_path / "out" / "scores.md").read_text()
    assert "| m@10 | piqa | acc | 0 | 62.50 | 17.00 | 50.00 | 8 | - |" in markdown
    assert json.loads((tmp_path / "out" / "samples.jsonl").read_text()) == {"doc": "问"}
    print_scores(EVALUATED, SUITE)
    printed = capsys.readouterr().out
    for text in (markdown, printed):
        assert "before texts: no token" in text
        assert "first 7 questions of each task: not comparable" in text
    assert "62.50" in printed


def test_an_older_report_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_reports(tmp_path, EVALUATED, SUITE)
