"""The machine's corpus: deterministic, without duplicates or absolute paths, split by content."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_hammer.corpus.machine_text import build_machine_corpus, find_machine_text
from megatron_hammer.errors import DataError, OutputError


def fail() -> str:
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


CANDIDATES = {f"docs/{number}": lambda number=number: f"document {number} " * 40 for number in range(200)}
ODD_CANDIDATES = {
    "docs/same": lambda: "document 3 " * 40,
    "docs/short": lambda: "short",
    "docs/long": lambda: "long " * 50_000,
    "docs/binary": fail,
}


def build(folder: Path, **options: object) -> list[dict[str, str]]:
    build_machine_corpus(folder / "c.jsonl", candidates=CANDIDATES | ODD_CANDIDATES, **options)  # type: ignore[arg-type]
    return read(folder / "c.jsonl")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_skipped_candidates_are_counted_by_reason(tmp_path: Path) -> None:
    corpus = build_machine_corpus(tmp_path / "c.jsonl", candidates=CANDIDATES | ODD_CANDIDATES)
    assert corpus.num_train_documents == 200
    assert corpus.skipped == Counter({"duplicate": 1, "too short": 1, "too long": 1, "unreadable": 1})
    assert corpus.train_bytes == sum(len(document["text"]) for document in read(tmp_path / "c.jsonl"))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = build(tmp_path, seed=1)
    assert build(tmp_path, seed=1) == first
    other = build(tmp_path, seed=2)
    assert other != first
    assert {document["text"] for document in other} == {document["text"] for document in first}


def test_the_size_limit_is_kept(tmp_path: Path) -> None:
    documents = build(tmp_path, max_bytes=10_000)
    assert 9_000 < sum(len(document["text"]) for document in documents) <= 10_000


def test_split_is_by_content_and_complete(tmp_path: Path) -> None:
    def split(seed: int) -> tuple[set[str], set[str]]:
        valid_path = tmp_path / "v.jsonl"
        train = build(tmp_path, seed=seed, valid_output_path=valid_path, valid_ratio=0.25)
        return {document["text"] for document in train}, {document["text"] for document in read(valid_path)}

    train, valid = split(seed=1)
    assert 30 <= len(valid) <= 70
    assert not train & valid
    assert len(train | valid) == 200
    assert split(seed=2) == (train, valid)


def test_a_small_corpus_has_one_document_held_out(tmp_path: Path) -> None:
    train = build(tmp_path, max_bytes=10_000, valid_output_path=tmp_path / "v.jsonl", valid_ratio=1e-9)
    (held_out,) = read(tmp_path / "v.jsonl")
    assert len(train) > 5
    assert held_out not in train


def test_an_empty_side_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v.jsonl: held-out corpus must have.*got none of 200.*--valid"):
        build(tmp_path, valid_output_path=tmp_path / "v.jsonl", valid_ratio=0.0)
    with pytest.raises(DataError, match=r"c.jsonl: corpus must have a document, got none \(.*\).*--max-bytes"):
        build(tmp_path, max_bytes=10)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"c.jsonl: file cannot be written \(File exists\). Free space, or choose"):
        build(tmp_path / "file")


def test_this_machine_has_text() -> None:
    names = find_machine_text()
    assert "stdlib/ast.py" in names
    assert not [name for name in names if name.startswith("/") or re.search(r"(^|/)\.\.(/|$)", name)]
    kinds = Counter(name.partition("/")[0] for name in names)
    assert kinds["stdlib"] > 100
    assert kinds["packages"] > 10
    assert "def parse(" in names["stdlib/ast.py"]()
    metadata = next(name for name in names if name.startswith("packages/pytest/") and name.endswith("METADATA"))
    assert not names[metadata]().startswith("Metadata-Version")
