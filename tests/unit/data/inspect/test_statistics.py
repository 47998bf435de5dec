"""Counts of a pair against a plain count of the same documents."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.index_format import bin_path
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.data.inspect import statistics as inspection
from megatron_hammer.data.inspect.statistics import count_duplicates, inspect_pair, summarise_lengths
from megatron_hammer.errors import DataError
from tests.helpers.indexed_writing import add_document

VOCAB_SIZE = 41


def draw_documents(num_documents: int = 300) -> list[list[int]]:
    """Some are empty, some repeat, and ids are never 0 nor 40."""
    rng = np.random.default_rng(2)
    documents = [rng.integers(1, 40, rng.integers(0, 30)).tolist() for _ in range(num_documents)]
    return documents + documents[::7] + [[3]] * 5


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for number, ids in enumerate(documents):
            half = len(ids) // 2
            lengths = (half, len(ids) - half) if number % 3 == 0 and half else None  # some of two sequences
            add_document(writer, np.array(ids, dtype=dtype), lengths)
    return prefix


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 20])
def test_everything_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(inspection, "CHUNK_BYTES", chunk_bytes)
    documents = draw_documents()
    progress: list[tuple[int, int]] = []
    index = read_index(write_pair(tmp_path / "pair", documents))
    statistics = inspect_pair(index, vocab_size=VOCAB_SIZE, on_progress=lambda *counts: progress.append(counts))
    assert statistics.lengths.tolist() == [len(ids) for ids in documents]
    counts = Counter(token_id for ids in documents for token_id in ids)
    assert statistics.token_counts.tolist() == [counts[token_id] for token_id in range(VOCAB_SIZE)]
    assert statistics.num_unused_ids == 2
    assert statistics.num_empty_documents == sum(not ids for ids in documents)
    assert statistics.select_frequent_ids(5) == sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    assert len(statistics.select_frequent_ids(100)) == 39
    texts = Counter(tuple(ids) for ids in documents if ids)
    duplicates = statistics.duplicates
    assert duplicates.num_duplicates == sum(texts.values()) - len(texts)
    assert duplicates.num_duplicate_tokens == sum(len(ids) * (count - 1) for ids, count in texts.items())
    assert duplicates.num_texts_repeated == sum(count > 1 for count in texts.values())
    assert duplicates.most_copies == max(texts.values())
    assert progress[-1] == (index.num_tokens, index.num_tokens)


def test_without_a_vocabulary_ids_count_up_to_the_largest(tmp_path: Path) -> None:
    statistics = inspect_pair(read_index(write_pair(tmp_path / "pair", [[2, 5], [9]])))
    assert (len(statistics.token_counts), statistics.num_unused_ids) == (10, 7)


def test_a_pair_without_documents(tmp_path: Path) -> None:
    statistics = inspect_pair(read_index(write_pair(tmp_path / "pair", [])), vocab_size=VOCAB_SIZE)
    assert summarise_lengths(statistics.lengths) is None
    assert statistics.duplicates.num_duplicates == statistics.duplicates.most_copies == 0
    assert statistics.select_frequent_ids(5) == []


def test_length_figures_are_lengths_that_occur() -> None:
    summary = summarise_lengths(np.array([5, 1, 2, 3, 4, 100, 6, 7, 8, 9]))
    assert summary is not None
    assert (summary.minimum, summary.median, summary.p90, summary.p99, summary.maximum) == (1, 5, 9, 100, 100)
    assert summary.mean == 14.5


def test_duplicates_are_found_by_hash_alone() -> None:
    digests, lengths = np.array([7, 8, 7, 0, 0, 8, 7], dtype=np.uint64), np.array([2, 3, 2, 0, 0, 3, 2])
    summary = count_duplicates(digests, lengths)
    assert (summary.num_duplicates, summary.num_duplicate_tokens) == (3, 7)
    assert (summary.num_texts_repeated, summary.most_copies) == (2, 3)


def test_values_that_cannot_be_token_ids_are_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", [[1, 2, 77]], np.int32)
    with pytest.raises(DataError, match=r"pair\.bin: token ids must lie in 0\.\.40, got id=77\b"):
        inspect_pair(read_index(prefix), vocab_size=VOCAB_SIZE)
    bin_path(prefix).write_bytes(np.array([1, -5, 77], dtype=np.int32).tobytes())
    with pytest.raises(DataError, match=r"token ids must lie in 0\.\.16777215, got id=-5\."):
        inspect_pair(read_index(prefix))
    bin_path(prefix).write_bytes(np.array([1, 2**30, 77], dtype=np.int32).tobytes())
    with pytest.raises(DataError, match=r"token ids must lie in 0\.\.16777215, got id=1073741824\."):
        inspect_pair(read_index(prefix))
    content = bytearray((tmp_path / "pair.idx").read_bytes())
    content[17] = 7  # float32, of the same width
    (tmp_path / "pair.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"pair\.idx: token ids must be integers, got dtype=float32\. This pair"):
        inspect_pair(read_index(prefix))
