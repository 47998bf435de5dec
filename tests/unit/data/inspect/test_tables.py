"""The report of a pair, also of an empty one, one of another tool, and one whose text looks like markup."""

import io
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.data.inspect.document_text import DocumentText
from megatron_hammer.data.inspect.statistics import inspect_pair
from megatron_hammer.data.inspect.tables import (
    SAMPLE_CHARACTERS,
    FrequentToken,
    PairReport,
    find_common_documents,
    print_common_documents,
    print_pair_report,
    report_to_json,
)
from tests.helpers.indexed_writing import add_document


def build_report(prefix: Path, documents: list[list[int]], **values: object) -> PairReport:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for ids in documents:
            add_document(writer, np.array(ids, dtype=np.uint16))
    fields = {"vocab_size": None, "manifest": None, "verified": None, "frequent_tokens": (), "samples": ()} | values
    return PairReport(prefix=str(prefix), statistics=inspect_pair(read_index(prefix)), **fields)  # type: ignore[arg-type]


def render(report: PairReport, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    print_pair_report(report, stream)
    return stream.getvalue()


def test_an_empty_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(tmp_path / "pair", [])
    text = render(report, monkeypatch)
    assert "0 (0.00%) with 0 tokens (0.00%)" in text
    assert "documents by length" not in text
    values = orjson.loads(orjson.dumps(report_to_json(report)))
    assert values["document_tokens"] is None
    assert values["length_histogram"] == []
    assert values["manifest"] is None


def test_counts_and_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(tmp_path / "pair", [[1, 2, 3], [], [1, 2, 3], [7]])
    lines = [" ".join(line.split()) for line in render(report, monkeypatch).splitlines()]
    assert "tokens of a document min 0, median 1, mean 1.8, p90 3, p99 3, max 3" in lines
    assert "duplicate documents 1 (33.33%) with 3 tokens (42.86%); 1 texts repeat, the most 2 times" in lines
    assert "ids that never occur 4 of 8 up to the largest that occurs (50.00%)" in lines
    assert "2 - 3 2 6 85.71% ####################" in lines
    histogram = report_to_json(report)["length_histogram"]
    assert [row["num_documents"] for row in histogram] == [1, 1, 2]
    assert [(row["min_tokens"], row["max_tokens"]) for row in histogram] == [(0, 0), (1, 1), (2, 3)]


def test_text_is_shown_as_it_is_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = DocumentText(number=1234, num_tokens=5, text="[red]春[/red] :smile: " + "x" * SAMPLE_CHARACTERS + "END")
    token = FrequentToken(token_id=7, count=1, text="'[bold]'")
    text = render(build_report(tmp_path / "pair", [[7]], samples=[sample], frequent_tokens=[token]), monkeypatch)
    assert "document 1,234, 5 tokens:" in text
    assert "[red]春[/red] :smile: " in text
    assert "x..." in text
    assert "END" not in text
    assert "'[bold]'" in text


def test_without_a_tokenizer_tokens_have_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = FrequentToken(token_id=7, count=1, text=None)
    text = render(build_report(tmp_path / "pair", [[7]], frequent_tokens=[token]), monkeypatch)
    (heading,) = [line for line in text.splitlines() if "share" in line and "count" in line]
    assert heading.split() == ["id", "count", "share"]


def test_documents_of_another_pair(tmp_path: Path) -> None:
    train = build_report(tmp_path / "train", [[1, 2], [1, 2], [], [3], [4, 5]])
    valid = build_report(tmp_path / "valid", [[], [3], [6], [5, 4]])
    rows = find_common_documents([train, valid])
    assert [(row.prefix, row.other_prefix, row.num_common, row.num_documents) for row in rows] == [
        (train.prefix, valid.prefix, 1, 5),
        (valid.prefix, train.prefix, 1, 4),
    ]
    assert [row.num_common for row in find_common_documents([train, train])] == [4, 4]
    stream = io.StringIO()
    print_common_documents(find_common_documents([train]), stream)
    assert stream.getvalue() == ""
    print_common_documents(rows, stream)
    assert "25.00%" in stream.getvalue()
