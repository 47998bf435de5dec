"""tools/dedup_data.py as a user runs it: from raw text with duplicates to what the preprocessor reads."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.tool_runs import Finished, run_tool
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl

pytestmark = pytest.mark.integration


def run(*arguments: str | Path, cwd: Path) -> Finished:
    return run_tool("tools/dedup_data.py", *arguments, cwd=cwd, PYTHONHASHSEED="random")


@pytest.fixture
def corpus_path(tmp_path: Path) -> Path:
    words = " ".join(f"word{i}" for i in range(60))
    texts = [*TOY_TEXTS, TOY_TEXTS[1], words, words + " the end"]
    return write_jsonl(tmp_path / "corpus.jsonl", texts, key="content")


def test_duplicates_are_removed_and_reported(tmp_path: Path, corpus_path: Path) -> None:
    arguments = ("--input", "corpus.jsonl", "--json-keys", "content", "--near-duplicates", "--threshold", "0.7")
    arguments += ("--workers", "1")
    code, stdout, stderr = run(*arguments, "--output", "a.jsonl", "--report", "removed.jsonl", cwd=tmp_path)
    assert (code, stderr) == (0, "")
    chances, summary = stdout.splitlines()
    assert re.match(r"chance that a document is removed, by its similarity to a kept one: 0\.5: 0\.0%, 0\.6: ", chances)
    assert summary.startswith("a.jsonl: 6 documents in, 4 kept, 1 exact and 1 near duplicates removed; ")
    report = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert [(row["removed"], row["duplicate_of"], row["kind"]) for row in report] == [
        ("corpus.jsonl:4", "corpus.jsonl:2", "exact"),
        ("corpus.jsonl:6", "corpus.jsonl:5", "near"),
    ]
    code, stdout, _ = run(*arguments, "--output", "b.jsonl", "--report", "again.jsonl", "--json", cwd=tmp_path)
    assert code == 0
    assert {"num_kept": 4, "num_near_duplicates": 1}.items() <= json.loads(stdout).items()
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "removed.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--input", "none.jsonl", "--output", "a.jsonl"), "error: none.jsonl: input file does not exist."),
        (("--input", "corpus.jsonl", "--output", "a.jsonl"), 'error: corpus.jsonl:1: field "text" is missing'),
        (("--input", "corpus.jsonl", "--output", "a.csv"), "error: output: file name must end with .jsonl"),
        (
            ("--input", "corpus.jsonl", "--output", "a.jsonl", "--near-duplicates", "--threshold", "80"),
            "error: threshold: must lie above 0 and up to 1, got 80.0.",
        ),
        (("--input", "corpus.jsonl", "--output", "a.jsonl", "--workers", "0"), "--workers must be at least 1, got 0"),
        (
            ("--input", "corpus.jsonl", "--output", "a.jsonl", "--threshold", "0.8"),
            "--threshold needs --near-duplicates, got threshold=0.8 alone",
        ),
        (("--input", "corpus.jsonl"), "the following arguments are required: --output"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, corpus_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = run(*arguments, cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == [corpus_path]
