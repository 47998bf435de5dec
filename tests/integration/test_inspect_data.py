"""tools/inspect_data.py as a user runs it, on pairs of the preprocessor."""

import json
from pathlib import Path

import pytest

from tests.helpers.tool_runs import Finished, run_tool
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer, write_jsonl

pytestmark = pytest.mark.integration

TEXTS = [*TOY_TEXTS, TOY_TEXTS[0], "", "[bold]the fox[/bold] 春"]


def run(tool: str, *arguments: str | Path, cwd: Path) -> Finished:
    return run_tool(Path("tools", tool), *arguments, cwd=cwd, COLUMNS="120")


def inspect(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    return run("inspect_data.py", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    train_toy_tokenizer(folder)
    write_jsonl(folder / "corpus.jsonl", TEXTS)
    code, _, stderr = run(
        "preprocess_data.py",
        *("--input", "corpus.jsonl", "--tokenizer-model", "toy.model", "--output-prefix", "pair", "--workers", "1"),
        cwd=folder,
    )
    assert code == 0, stderr
    return folder


PAIR = "pair_text_document"


def test_everything_about_a_pair(folder: Path, tmp_path: Path) -> None:
    plot_path, csv_path = tmp_path / "lengths.png", tmp_path / "lengths.csv"
    arguments = (PAIR, "--tokenizer-model", "toy.model", "--verify", "--samples", "6")
    code, stdout, stderr = inspect(*arguments, "--plot", plot_path, "--csv", csv_path, cwd=folder)
    assert (code, stderr) == (0, "")
    for text in ("documents by length", "most frequent tokens", "every byte read, no problem found", "toy.model"):
        assert text in stdout
    assert "[bold]the fox[/bold] 春" in stdout
    assert "1 (20.00%) with " in stdout
    num_tokens = json.loads((folder / f"{PAIR}.manifest.json").read_bytes())["num_tokens"]
    assert stdout.splitlines()[-1] == (
        f"1 pairs, 6 documents, {num_tokens:,} tokens, 1 duplicates within a pair, 1 empty, verified; "
        f"wrote {plot_path}; wrote {csv_path}"
    )
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert csv_path.read_text().startswith("min_tokens,max_tokens,documents,tokens\n0,0,1,0\n")


def test_json_says_the_same(folder: Path) -> None:
    code, stdout, stderr = inspect(PAIR, "--tokenizer-model", "toy.model", "--samples", "2", "--json", cwd=folder)
    assert (code, stderr) == (0, "")
    (pair,) = json.loads(stdout)["pairs"]
    assert (pair["num_documents"], pair["num_empty_documents"], pair["vocab_size"]) == (6, 1, TOY_VOCAB_SIZE)
    assert pair["duplicates"]["num_duplicates"] == 1
    assert pair["document_tokens"]["minimum"] == 0
    assert sum(row["num_documents"] for row in pair["length_histogram"]) == 6
    assert sum(row["num_tokens"] for row in pair["length_histogram"]) == pair["num_tokens"]
    assert all(sample["text"] == TEXTS[sample["number"]] for sample in pair["samples"])
    assert pair["manifest"]["tokenizer"]["vocab_size"] == TOY_VOCAB_SIZE
    assert not pair["is_verified"]


def test_a_document_and_a_search(folder: Path) -> None:
    code, stdout, _ = inspect(PAIR, "--tokenizer-model", "toy.model", "--document", "2", cwd=folder)
    assert code == 0
    assert stdout.startswith(TEXTS[2])
    assert stdout.splitlines()[-1].startswith(f"{PAIR}: document 2 of 6, ")
    code, stdout, _ = inspect(PAIR, "--tokenizer-model", "toy.model", "--search", "the fox", cwd=folder)
    assert code == 0
    matches = [number for number, text in enumerate(TEXTS) if "the fox" in text]
    assert [line.partition(", ")[0] for line in stdout.splitlines()[:-1]] == [f"{PAIR}: document {n}" for n in matches]
    assert stdout.splitlines()[-1] == f"{len(matches)} documents contain 'the fox', of 6 searched"
    code, stdout, _ = inspect(
        *(PAIR, "--tokenizer-model", "toy.model", "--search", "the fox", "--max-matches", "1", "--json"), cwd=folder
    )
    (pair,) = json.loads(stdout)["pairs"]
    assert (pair["has_stopped"], pair["num_searched_documents"], len(pair["matches"])) == (True, 1, 1)


def test_a_damaged_pair_is_named(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        content = (folder / f"{PAIR}{suffix}").read_bytes()
        (tmp_path / f"short{suffix}").write_bytes(content[:-8])
        (tmp_path / f"mixed{suffix}").write_bytes(content if suffix == ".idx" else content + content)
    code, stdout, stderr = inspect("short", "mixed", "--verify", cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert "error: short.idx: size must be " in stderr
    assert "error: mixed.bin: size must be " in stderr
    code, stdout, stderr = inspect("mixed", cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: mixed.bin: size must be ")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other_path = tmp_path / "other.model"
    code, _, stderr = run(
        "tokenizer_train.py",
        *("--input", folder / "corpus.jsonl", "--output", other_path, "--vocab-size", "330"),
        cwd=tmp_path,
    )
    assert code == 0, stderr
    code, stdout, stderr = inspect(PAIR, "--tokenizer-model", other_path, cwd=folder)
    assert (code, stdout) == (2, "")
    assert f"error: {PAIR}: pair must be read with the tokenizer that encoded it, toy.model (" in stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none",), "error: none.bin: file does not exist."),
        ((PAIR, "--samples", "1"), "error: tokenizer-model: must be given to show text (--samples), got none."),
        ((PAIR, "--document", "0"), "error: tokenizer-model: must be given to show text (--document), got none."),
        ((PAIR, "--search", "x"), "error: tokenizer-model: must be given to show text (--search), got none."),
        ((PAIR, "--top", "-1"), "error: top: must be at least 0, got -1."),
        ((PAIR, "--search", "x", "--max-matches", "0"), "error: max-matches: must be at least 1, got 0."),
        ((PAIR, "--plot", "a.pdf"), "error: plot: file name must end with .png, got a.pdf."),
        ((PAIR, PAIR, "--plot", "a.png"), "error: plot: must be of one pair, got 2."),
        ((PAIR, "--tokenizer-model", "none.model"), "error: none.model: tokenizer does not exist."),
        (
            (PAIR, "--tokenizer-model", "toy.model", "--document", "6"),
            "error: document: must lie in 0..5, got 6.",
        ),
        (
            (PAIR, "--tokenizer-model", "toy.model", "--document", "6", "--search", "x"),
            "error: document: cannot be combined with --search, got both.",
        ),
        ((PAIR, "--search", "x", "--plot", "a.png"), "error: plot: cannot be combined with --search, got both."),
        ((PAIR, "--csv", "corpus.jsonl"), "error: corpus.jsonl: file must be an earlier result of this command"),
        ((PAIR, "--tokenizer-model", "toy.model", "--search", ""), "error: search: text must not be empty"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = inspect(*arguments, cwd=folder)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert "Traceback" not in stderr
