"""Documents keep their sequences and their ids together, however many are read or reordered at once."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed import documents as documents_module
from megatron_hammer.data.indexed.documents import Documents, bound_memory, read_pair_documents
from megatron_hammer.data.indexed.pair import IndexedWriter, read_index
from megatron_hammer.errors import DataError
from tests.helpers.indexed_writing import add_document

# Lengths of the sequences of each document; the ids count up, so every one of them is told from the others.
SEQUENCES = ((3,), (), (2, 1, 4), (0,), (5,), (), (1, 0, 1), (60,), (2,))


def write_pair(prefix: Path) -> Path:
    first_id = 0
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for lengths in SEQUENCES:
            add_document(writer, np.arange(first_id, first_id + sum(lengths)), lengths)
            first_id += sum(lengths)
    return prefix


def list_documents(documents: Documents) -> list[list[list[int]]]:
    """Return the ids by document and sequence, in plain Python."""
    ids, lengths = documents.ids.tolist(), documents.sequence_lengths.tolist()
    listed = []
    for count in documents.sequences_per_document.tolist():
        sequences = []
        for length in lengths[:count]:
            sequences.append(ids[:length])
            ids = ids[length:]
        lengths = lengths[count:]
        listed.append(sequences)
    assert ids == lengths == []
    return listed


@pytest.mark.parametrize("chunk_bytes", [1, 500, 1000, 1 << 20])
@pytest.mark.parametrize("documents_at_once", [1, 2, 100])
def test_documents_are_read_whole_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, documents_at_once: int
) -> None:
    monkeypatch.setattr(documents_module, "DOCUMENTS_AT_ONCE", documents_at_once)
    chunks = list(read_pair_documents(read_index(write_pair(tmp_path / "pair")), chunk_bytes=chunk_bytes))
    listed = [document for chunk in chunks for document in list_documents(chunk)]
    assert [[len(sequence) for sequence in document] for document in listed] == [list(x) for x in SEQUENCES]
    assert [token for document in listed for sequence in document for token in sequence] == list(range(79))
    assert max(len(chunk) for chunk in chunks) == (1 if chunk_bytes == 1 or documents_at_once == 1 else len(chunks[0]))


@pytest.mark.parametrize("chosen", [[0], [7], [8, 2, 6, 3, 1], list(range(9)), [2, 2]])
def test_chosen_documents_keep_their_sequences(tmp_path: Path, chosen: list[int]) -> None:
    (documents,) = read_pair_documents(read_index(write_pair(tmp_path / "pair")), chunk_bytes=1 << 20)
    listed = list_documents(documents)
    assert list_documents(documents.select(np.array(chosen))) == [listed[number] for number in chosen]


def test_ranges_cost_at_most_the_bound_or_are_one_item() -> None:
    assert list(bound_memory(np.array([3, 4, 5, 20, 1, 1]), 9)) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(bound_memory(np.array([], dtype=np.int64), 9)) == []


def damage(path: Path, offset_bytes: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset_bytes)
        file.write(content)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    index = read_index(write_pair(tmp_path / "pair"))
    assert index.num_sequences == 11
    damage(index.idx_path, 34 + 12 * 11 + 8 * 3, (0).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"pair.idx: document index must not decrease, nor pass the 11 sequences, got"):
        list(read_pair_documents(index, chunk_bytes=1 << 20))
    index = read_index(write_pair(tmp_path / "pair"))
    damage(index.idx_path, 34 + 4, b"\xff\xff\xff\xff")
    with pytest.raises(DataError, match=r"pair.idx: lengths must be at least 0, got -1. The file is damaged"):
        list(read_pair_documents(index, chunk_bytes=1 << 20))


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    index = read_index(write_pair(tmp_path / "pair"))
    with open(index.bin_path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"pair.bin: file must have 158 more bytes.*got 100\b"):
        list(read_pair_documents(index, chunk_bytes=1 << 20))
