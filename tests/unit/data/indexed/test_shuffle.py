"""A shuffle keeps every document whole, is uniform, and depends on the seed and the number of documents alone."""

import dataclasses
import tracemalloc
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed import shuffle
from megatron_hammer.data.indexed.pair import IndexedWriter, IndexSummary, bin_path, idx_path, read_index
from megatron_hammer.data.indexed.shuffle import (
    count_buckets,
    draw_keys,
    select_buckets,
    select_memory_bytes,
    shuffle_pairs,
)
from megatron_hammer.errors import OutputError
from tests.helpers.indexed_writing import add_document

NUM_DOCUMENTS = 311
SEED = 1234


def write_source(prefix: Path, *, num_documents: int = NUM_DOCUMENTS, first_id: int = 0) -> IndexSummary:
    """Documents of 0 to 3 sequences of 0 to 6 ids; every id occurs once."""
    generator = np.random.default_rng(first_id)
    with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
        for _ in range(num_documents):
            lengths = generator.integers(0, 7, size=generator.integers(0, 4)).tolist()
            add_document(writer, np.arange(first_id, first_id + sum(lengths)), lengths)
            first_id += sum(lengths)
    return read_index(prefix)


def list_documents(index: IndexSummary) -> list[tuple[tuple[int, ...], ...]]:
    ends = np.concatenate(([0], np.cumsum(index.sequence_lengths)))
    sequences = [tuple(index.tokens[start:end].tolist()) for start, end in pairwise(ends)]
    bounds = index.document_index.tolist()
    return [tuple(sequences[start:end]) for start, end in pairwise(bounds)]


def shuffle_one(source: IndexSummary, prefix: Path, *, seed: int = SEED, max_memory_bytes: int = 1 << 20) -> Path:
    with IndexedWriter(prefix, source.dtype) as writer:
        shuffle_pairs(
            [source], [writer], seed=seed, work_dir=prefix.parent / "buckets", max_memory_bytes=max_memory_bytes
        )
    return prefix


def read_bytes(prefix: Path) -> bytes:
    return bin_path(prefix).read_bytes() + idx_path(prefix).read_bytes()


def sort_by_key(documents: list, seed: int) -> list:
    """What the shuffle must give: the documents in the order of their keys, in plain Python."""
    keys = draw_keys(seed, 0, len(documents)).tolist()
    return [document for _, document in sorted(zip(keys, documents, strict=True), key=lambda pair: pair[0])]


@pytest.mark.parametrize("max_memory_bytes", [1, 4_000, 20_000, 1 << 20])
def test_documents_are_moved_whole_and_the_memory_limit_changes_nothing(tmp_path: Path, max_memory_bytes: int) -> None:
    source = write_source(tmp_path / "source")
    assert count_buckets([source], 1) > 1000
    before = list_documents(source)
    after = list_documents(read_index(shuffle_one(source, tmp_path / "out", max_memory_bytes=max_memory_bytes)))
    assert Counter(after) == Counter(before)
    assert after == sort_by_key(before, SEED)
    assert after != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "source.bin", "source.idx"]


def test_a_bucket_that_breaks_the_order_of_keys_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: the documents are all there, but their order depends on the number of buckets."""
    source = write_source(tmp_path / "source")
    monkeypatch.setattr(shuffle, "select_buckets", lambda keys, num: num - 1 - select_buckets(keys, num))
    after = list_documents(read_index(shuffle_one(source, tmp_path / "out", max_memory_bytes=20_000)))
    assert Counter(after) == Counter(list_documents(source))
    assert after != sort_by_key(list_documents(source), SEED)


def test_several_pairs_get_the_same_order(tmp_path: Path) -> None:
    sources = [write_source(tmp_path / "a"), write_source(tmp_path / "b", first_id=9000)]
    prefixes = [tmp_path / "out_a", tmp_path / "out_b"]
    writers = [IndexedWriter(prefix, np.dtype(np.int32)) for prefix in prefixes]
    moved = []
    shuffle_pairs(
        sources,
        writers,
        seed=SEED,
        work_dir=tmp_path / "buckets",
        max_memory_bytes=9_000,
        on_progress=lambda done, total: moved.append((done, total)),
    )
    for source, prefix, writer in zip(sources, prefixes, writers, strict=True):
        writer.finish()
        writer.publish()
        assert list_documents(read_index(prefix)) == sort_by_key(list_documents(source), SEED)
    assert moved[-1] == (2 * 4 * sum(source.num_tokens for source in sources),) * 2
    with pytest.raises(ValueError, match=r"must have the same number of documents, got \[311, 2\]"):
        shuffle_pairs(
            [sources[0], write_source(tmp_path / "c", num_documents=2)], writers, seed=1, work_dir=tmp_path / "buckets"
        )


def test_a_finished_pair_without_its_name_can_be_shuffled(tmp_path: Path) -> None:
    expected = read_bytes(shuffle_one(write_source(tmp_path / "source"), tmp_path / "expected"))
    for name in ("bin", "idx"):
        (tmp_path / f"source.{name}").rename(tmp_path / f"source.{name}.partial")
    source = read_index(tmp_path / "source", is_partial=True)
    assert read_bytes(shuffle_one(source, tmp_path / "out")) == expected


@pytest.mark.parametrize("num_documents", [0, 1])
def test_a_pair_of_at_most_one_document_is_unchanged(tmp_path: Path, num_documents: int) -> None:
    source = write_source(tmp_path / "source", num_documents=num_documents)
    prefix = shuffle_one(source, tmp_path / "out", max_memory_bytes=1)
    assert read_bytes(prefix) == read_bytes(tmp_path / "source")


def test_leftovers_of_an_earlier_attempt_are_removed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    expected = read_bytes(shuffle_one(source, tmp_path / "expected"))
    (tmp_path / "buckets").mkdir()
    (tmp_path / "buckets" / "bucket-000000.ids").write_bytes(b"left from a killed run")
    (tmp_path / "buckets" / "notes.txt").write_text("not ours")
    assert read_bytes(shuffle_one(source, tmp_path / "out")) == expected
    assert [path.name for path in (tmp_path / "buckets").iterdir()] == ["notes.txt"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")

    def interrupt(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > 1.5 * total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "out", source.dtype) as writer:
        shuffle_pairs(
            [source],
            [writer],
            seed=SEED,
            work_dir=tmp_path / "buckets",
            max_memory_bytes=9_000,
            on_progress=interrupt,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.bin", "source.idx"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"file/buckets: file cannot be written \(Not a directory\). Free space, or"),
        IndexedWriter(tmp_path / "out", source.dtype) as writer,
    ):
        shuffle_pairs([source], [writer], seed=SEED, work_dir=tmp_path / "file" / "buckets")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    monkeypatch.setattr(shuffle._Buckets, "_paths", lambda self, bucket: (Path("/dev/full"),) * 3)
    with (
        pytest.raises(OutputError, match=r"/dev/full: file cannot be written \(No space left on device\)"),
        IndexedWriter(tmp_path / "out", source.dtype) as writer,
    ):
        shuffle_pairs([source], [writer], seed=SEED, work_dir=tmp_path / "buckets")


def test_memory_stays_within_the_limit_however_large_the_pair(tmp_path: Path) -> None:
    """Sixteen times the limit in short documents, and one document of twice the limit."""
    limit_bytes = 1 << 20
    with IndexedWriter(tmp_path / "source", np.dtype(np.uint16)) as writer:
        for _ in range(8):
            writer.add_documents(np.zeros(1 << 20, dtype=np.uint16), np.full(1 << 10, 1 << 10))
    peaks_bytes = []
    for prefix in ("source", "with_large"):
        if prefix == "with_large":
            with IndexedWriter(tmp_path / prefix, np.dtype(np.uint16)) as writer:
                add_document(writer, np.zeros(limit_bytes, dtype=np.uint16))
                writer.add_documents(np.zeros(1 << 20, dtype=np.uint16), np.full(1 << 10, 1 << 10))
        source = read_index(tmp_path / prefix)
        tracemalloc.start()
        shuffle_one(source, tmp_path / "out", max_memory_bytes=limit_bytes)
        peaks_bytes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert read_index(tmp_path / "out").num_documents == source.num_documents
    writer_buffers_bytes = 3 << 20
    assert peaks_bytes[0] < 1.5 * limit_bytes + writer_buffers_bytes
    assert peaks_bytes[1] < 2 * limit_bytes + 1.5 * limit_bytes + writer_buffers_bytes


def test_a_larger_pair_gets_more_memory_up_to_a_limit(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_documents=1)
    for num_gib, expected_mib, expected_buckets in ((1, 128, 17), (100, 200, 1025), (1024, 512, 4097)):
        large = dataclasses.replace(source, num_tokens=num_gib << 28)
        assert select_memory_bytes([large]) >> 20 == expected_mib
        assert count_buckets([large], select_memory_bytes([large])) == expected_buckets


# --- the random order ------------------------------------------------------------------------------------------------


def test_keys_do_not_depend_on_how_they_are_drawn() -> None:
    keys = draw_keys(SEED, 0, 1000)
    for first in (0, 1, 2, 3, 4, 517):
        for count in (0, 1, 4, 100):
            assert draw_keys(SEED, first, count).tolist() == keys[first : first + count].tolist()
    assert not set(draw_keys(SEED + 1, 0, 1000).tolist()) & set(keys.tolist())
    # written down, so that another version of numpy that gives another order is noticed
    assert keys[:2].tolist() == [6174562084317992592, 10878601555137825410]


def test_buckets_follow_the_keys_and_are_of_equal_width() -> None:
    keys = np.sort(draw_keys(SEED, 0, 70_000))
    for num_buckets in (1, 2, 7, 3001):
        buckets = select_buckets(keys, num_buckets)
        assert (np.diff(buckets) >= 0).all()
        assert set(buckets.tolist()) == set(range(num_buckets))
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert select_buckets(extremes, 20_000).tolist() == [0, 19_999]


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def test_every_order_of_four_documents_is_equally_likely() -> None:
    """24 orders over 4,800 seeds; of a fair shuffle, 23 degrees of freedom exceed 49.7 once in 1,000 times."""
    orders = Counter(tuple(np.argsort(draw_keys(seed, 0, 4)).tolist()) for seed in range(4800))
    assert chi_square([orders[order] for order in permutations(range(4))]) < 49.7
    biased = Counter(tuple(np.argsort(draw_keys(seed, 0, 4) >> np.uint64(61)).tolist()) for seed in range(4800))
    assert chi_square([biased[order] for order in permutations(range(4))]) > 49.7


def test_every_document_is_equally_likely_at_every_place() -> None:
    """8 places of document 2 of 8 within one seed's stream; 7 degrees of freedom exceed 24.3 once in 1,000 times."""
    keys = draw_keys(SEED, 0, 8 * 4000).reshape(4000, 8)
    places = Counter((keys < keys[:, 2:3]).sum(axis=1).tolist())
    assert chi_square([places[place] for place in range(8)]) < 24.3
