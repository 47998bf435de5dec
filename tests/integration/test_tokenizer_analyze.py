"""tokenizer_analyze.py as a user runs it: on the published tokenizers, on a toy corpus, and wrongly."""

import csv
import json
import re
from pathlib import Path

import pytest

from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.tool_runs import Finished, run_tool
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration

MODELS = SHARED_DATA / "tokenizer"


def run(*arguments: str | Path, cwd: Path) -> Finished:
    return run_tool("tools/tokenizer_analyze.py", *arguments, cwd=cwd)


@needs_shared_data
def test_the_published_table(tmp_path: Path) -> None:
    tokenizers = [f"{name}={MODELS / file}.model" for name, file in
                  (("InternLM", "internlm-7b"), ("Llama-2", "llama2-7b"), ("HammerLLM", "hammerllm"))]  # fmt: skip
    arguments = (
        "--charset",
        MODELS / "charsets_char.json",
        "--input",
        SHARED_DATA / "corpus",
        "--max-bytes",
        "1000000",
    )
    code, stdout, _ = run("--tokenizers", *tokenizers, *arguments, "--reference", "Llama-2", cwd=tmp_path)
    assert code == 0
    columns = [re.findall(rf"{level}级汉字 .*?([\d.]+) +([\d.]+) +([\d.]+) *$", stdout, re.MULTILINE)[0]
               for level in "一二三"]  # fmt: skip
    assert columns == [("100.00", "17.29", "100.00"), ("65.93", "0.13", "100.00"), ("5.67", "0.00", "100.00")]
    assert "documents changed by a round trip: InternLM 0, Llama-2 0, HammerLLM 0; " in stdout.splitlines()[-1]


@needs_shared_data
def test_hammerllm_loses_nothing_of_the_corpus(tmp_path: Path) -> None:
    arguments = ("--tokenizers", MODELS / "hammerllm.model", "--input", SHARED_DATA / "corpus", "--json")
    code, stdout, _ = run(*arguments, cwd=tmp_path)
    assert code == 0
    round_trip = json.loads(stdout)["tokenizers"][0]["round_trip"]
    assert round_trip == {"num_documents": 8780, "num_changed_documents": 0, "losses": {}}


def test_files_and_json_agree(tmp_path: Path) -> None:
    model = train_toy_tokenizer(tmp_path)
    write_jsonl(tmp_path / "c.jsonl", TOY_TEXTS)
    arguments = ("--tokenizers", f"a={model}", model, "--input", "c.jsonl", "--csv", "out/a.csv", "--plot", "out/a.png")
    code, stdout, stderr = run(*arguments, "--json", cwd=tmp_path)
    assert (code, stderr) == (0, "")
    analysis = json.loads(stdout)
    assert [row["name"] for row in analysis["tokenizers"]] == ["a", "toy"]
    with (tmp_path / "out" / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, described in zip(rows, analysis["tokenizers"], strict=True):
        assert int(row["corpus num_tokens"]) == described["corpus"]["num_tokens"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.csv", "a.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--input: a corpus or a --charset must be given, got neither. Pass what to measure."),
        (("--input", "c.jsonl", "--max-bytes", "0"), "--max-bytes: must be positive, got 0. Leave it out"),
        (("--input", "empty.jsonl"), "empty.jsonl: inputs must hold a document, got none (max-bytes=None). Add one,"),
        (("--input", "c.jsonl", "--max-bytes", "3"), "c.jsonl: inputs must hold a document, got none (max-bytes=3)."),
        (("--input", "absent.jsonl"), "absent.jsonl: input file does not exist. Check the path."),
        (("--input", "c.jsonl", "--plot", "toy.model"), "toy.model: file must be an earlier result of this command"),
        (("--input", "c.jsonl", "--csv", "c.jsonl/a.csv"), "c.jsonl/a.csv: file cannot be written ("),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    model = train_toy_tokenizer(tmp_path)
    write_jsonl(tmp_path / "c.jsonl", TOY_TEXTS)
    (tmp_path / "empty.jsonl").write_text("")
    code, stdout, stderr = run("--tokenizers", model, *arguments, cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")
    assert len(stderr.splitlines()) == 1
