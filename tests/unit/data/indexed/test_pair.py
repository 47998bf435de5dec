"""Our .bin/.idx files equal Megatron's byte for byte, and a damaged pair is refused by name."""

import dataclasses
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_hammer.data.indexed import pair_writer as indexed_writer
from megatron_hammer.data.indexed.manifest import manifest_path
from megatron_hammer.data.indexed.pair import IndexedWriter, WriterState, bin_path, idx_path, read_index, select_dtype
from megatron_hammer.errors import DataError, OutputError
from megatron_hammer.files.publish import publish_files
from tests.helpers.indexed_writing import add_document
from tests.helpers.messages import assert_problem, raises_problem

DOCUMENTS = ([5, 6, 7], [], [8], [1, 65_000, 3, 4, 9], [])


def write_pair(prefix: Path, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for ids in DOCUMENTS:
            add_document(writer, np.array(ids, dtype=np.int64))
    return prefix


def read_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 105_789])
def test_dtype_follows_megatrons_rule(vocab_size: int) -> None:
    assert select_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_equal_those_of_megatrons_builder(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert read_bytes(write_pair(tmp_path / "ours", dtype)) == read_bytes(tmp_path / "theirs")


def test_documents_added_together_give_the_same_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "together", np.dtype(np.uint16)) as writer:
        for part in (DOCUMENTS[:2], (), DOCUMENTS[2:]):
            ids = np.array([token for document in part for token in document], dtype=np.uint16)
            writer.add_documents(ids, np.array([len(document) for document in part], dtype=np.int64))
        assert (writer.num_documents, writer.num_tokens) == (5, 9)
    assert read_bytes(tmp_path / "together") == read_bytes(write_pair(tmp_path / "one_by_one"))


@pytest.mark.parametrize("chunk_entries", [1, 2, 100])
def test_documents_of_several_sequences_added_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_entries: int
) -> None:
    monkeypatch.setattr(indexed_writer, "INDEX_CHUNK_ENTRIES", chunk_entries)
    documents = [[2, 3], [], [4], [1, 0, 1]]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for lengths in documents:
        builder.add_document(torch.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", np.dtype(np.int32)) as writer:
        ids = np.concatenate([np.arange(sum(lengths)) for lengths in documents])
        lengths = np.array([length for lengths in documents for length in lengths])
        writer.add_documents(ids, lengths, np.array([len(lengths) for lengths in documents]))
    assert read_bytes(tmp_path / "ours") == read_bytes(tmp_path / "theirs")


def test_counts_that_do_not_add_up_are_a_bug(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "pair", np.dtype(np.int32))
    with pytest.raises(ValueError, match="sequence_lengths add up to 4, but there are 3 ids"):
        writer.add_documents(np.array([4, 5, 6]), np.array([2, 2]))
    with pytest.raises(ValueError, match="sequences_per_document add up to 3, but there are 2 sequences"):
        writer.add_documents(np.array([4, 5, 6]), np.array([2, 1]), np.array([3]))
    with pytest.raises(ValueError, match=r"sequence_lengths must lie in 0..2147483647, got -1..4\b"):
        writer.add_documents(np.array([4, 5, 6]), np.array([4, -1]), np.array([2]))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    ids, lengths = np.zeros(50_000, dtype=np.uint16), np.ones(50_000, dtype=np.int64)
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        peaks_bytes = []
        tracemalloc.start()
        for num_calls in (2, 40):
            for _ in range(num_calls):
                writer.add_documents(ids, lengths)
            add_document(writer, ids)
            peaks_bytes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
        tracemalloc.stop()
    assert peaks_bytes[1] < 1.1 * peaks_bytes[0] + 4096


def test_megatron_reads_a_written_pair(tmp_path: Path) -> None:
    dataset = IndexedDataset(str(write_pair(tmp_path / "pair")))
    assert [ids.tolist() for ids in dataset[:]] == [ids for ids in DOCUMENTS if ids]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 3, 3]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a.b.c", np.dtype(np.int32)) as writer:
        add_document(writer, np.array([4, 5, 6, 7, 8]), [2, 3])
        with pytest.raises(ValueError, match="sequence_lengths add up to 4, but there are 3 ids"):
            add_document(writer, np.array([4, 5, 6]), [2, 2])
    dataset = IndexedDataset(str(tmp_path / "a.b.c"))
    assert dataset.sequence_lengths.tolist() == [2, 3]
    assert dataset.document_indices.tolist() == [0, 2]


def test_ids_beyond_the_dtype_raise_and_do_not_wrap_around(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=re.escape("token ids must lie in 0..65535, got 70000..70000")),
        IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer,
    ):
        add_document(writer, np.array([70_000]))
    assert not list(tmp_path.iterdir())


def test_summary(tmp_path: Path) -> None:
    summary = read_index(write_pair(tmp_path / "pair"))
    assert (summary.num_documents, summary.num_sequences, summary.num_tokens) == (5, 3, 9)
    assert summary.dtype == np.uint16
    assert summary.sequence_lengths.tolist() == [3, 1, 5]
    assert summary.document_index.tolist() == [0, 1, 1, 2, 3, 3]
    assert summary.tokens.tolist() == [5, 6, 7, 8, 1, 65_000, 3, 4, 9]


def test_summary_of_a_pair_without_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.int32)) as writer:
        add_document(writer, np.array([], dtype=np.int32))
    summary = read_index(tmp_path / "pair")
    assert (summary.num_documents, summary.num_tokens) == (1, 0)
    assert summary.sequence_lengths.tolist() == summary.tokens.tolist() == []


def test_megatrons_multimodal_index_is_read(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "pair.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [1, 2], [0, 1])
    builder.finalize(str(tmp_path / "pair.idx"))
    summary = read_index(tmp_path / "pair")
    assert (summary.num_tokens, summary.has_modes) == (3, True)
    assert not read_index(write_pair(tmp_path / "plain")).has_modes


def error_of(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_index(prefix)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write_pair(tmp_path / "pair")
    Path(f"{prefix}.{suffix}").unlink()
    assert_problem(error_of(prefix), f"{prefix}.{suffix}:", "file does not exist")


@pytest.mark.parametrize("change", [b"", b"\x00\x00\x00\x00"])
def test_bin_of_another_size_is_named(tmp_path: Path, change: bytes) -> None:
    prefix = write_pair(tmp_path / "pair")
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content + change if change else content[:-1])
    assert_problem(
        error_of(prefix),
        f"{prefix}.bin:",
        "size must be 18 bytes",
        "(9 tokens of 2 bytes in the .idx)",
        f"got {22 if change else 17}",
    )


def test_damaged_index_is_named(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair")
    path = idx_path(prefix)
    content = path.read_bytes()
    size_bytes = 34 + 12 * 3 + 8 * 6
    assert len(content) == size_bytes
    path.write_bytes(b"")
    assert f"{path}: file must start with b'MMIDIDX\\x00\\x00', got b''. It is not an index" in error_of(prefix)
    path.write_bytes(b"PK" + content[2:])
    assert f"{path}: file must start with b'MMIDIDX\\x00\\x00', got b'PKIDIDX\\x00\\x00'." in error_of(prefix)
    path.write_bytes(content[:20])
    assert f"{path}: size must be at least 34 bytes, got 20. The index is truncated" in error_of(prefix)
    for length in (34, 40, size_bytes - 1, size_bytes - 8):
        path.write_bytes(content[:length])
        assert f"{path}: size must be {size_bytes} bytes, got {length}. The index is truncated" in error_of(prefix)
    path.write_bytes(content[:17] + b"\x63" + content[18:])
    assert "dtype code of 1 to 8 and a document index, got version=1, dtype code=99," in error_of(prefix)
    path.write_bytes(content[:-8] + (2).to_bytes(8, "little"))
    assert f"{path}: document index must end at sequence 3, got 2. The file is damaged" in error_of(prefix)


def list_names(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.parent.iterdir())


def test_the_final_names_appear_only_when_the_pair_is_complete(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "pair"
    writer = IndexedWriter(prefix, np.dtype(np.int32))
    add_document(writer, np.array([1, 2]))
    streams = ["pair.bin.partial", "pair.documents.partial", "pair.lengths.partial"]
    assert list_names(prefix) == streams
    writer.finish()
    assert list_names(prefix) == sorted([*streams, "pair.idx.partial"])
    summary = read_index(prefix, is_partial=True)
    assert (summary.num_documents, summary.tokens.tolist()) == (1, [1, 2])
    writer.publish()
    writer.abort()
    assert list_names(prefix) == ["pair.bin", "pair.idx"]


def test_an_exception_leaves_the_old_pair_and_no_new_one(tmp_path: Path) -> None:
    before = read_bytes(write_pair(tmp_path / "pair"))

    def write_and_stop() -> None:
        with IndexedWriter(tmp_path / "pair", np.dtype(np.int32)) as writer:
            add_document(writer, np.array([1, 2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert read_bytes(tmp_path / "pair") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupt_while_the_files_are_opened_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_stop(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(indexed_writer, "open", open_and_stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        IndexedWriter(tmp_path / "pair", np.dtype(np.int32))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    for suffix in ("bin", "idx", "lengths", "documents"):
        (tmp_path / f"pair.{suffix}.partial").symlink_to("/dev/full")
        with pytest.raises(
            OutputError, match=rf"pair.{suffix}.partial: file cannot be written \(No space left on device"
        ):
            write_pair(tmp_path / "pair")
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"pair.bin.partial: file cannot be written \(File exists\). Free space, or"):
        IndexedWriter(tmp_path / "file" / "pair", np.dtype(np.int32))


# --- after a kill ----------------------------------------------------------------------------------------------------


def add_rest(writer: IndexedWriter) -> IndexedWriter:
    for ids in DOCUMENTS[writer.num_documents :]:
        add_document(writer, np.array(ids, dtype=np.int64))
    return writer


@pytest.mark.parametrize("num_documents", range(len(DOCUMENTS) + 1))
def test_a_killed_run_continues_from_the_synced_bytes(tmp_path: Path, num_documents: int) -> None:
    """What the files hold beyond the state, as after a kill between two writes, is dropped."""
    expected = read_bytes(write_pair(tmp_path / "expected"))
    writer = IndexedWriter(tmp_path / "pair", np.dtype(np.uint16))
    for ids in DOCUMENTS[:num_documents]:
        add_document(writer, np.array(ids, dtype=np.int64))
    saved = json.dumps(dataclasses.asdict(writer.sync()))
    add_rest(writer).finish()
    state = WriterState(**json.loads(saved))
    resumed = IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), state)
    assert resumed.state == state
    with add_rest(resumed):
        pass
    assert read_bytes(tmp_path / "pair") == expected
    assert list_names(tmp_path / "pair") == ["expected.bin", "expected.idx", "pair.bin", "pair.idx"]


def test_close_keeps_what_abort_removes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        add_document(writer, np.array([1, 2]))
        writer.close()
    assert list_names(tmp_path / "pair") == ["pair.bin.partial", "pair.documents.partial", "pair.lengths.partial"]
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), writer.state) as resumed:
        add_document(resumed, np.array([3]))
    assert read_index(tmp_path / "pair").tokens.tolist() == [1, 2, 3]
    writer = IndexedWriter(tmp_path / "other", np.dtype(np.uint16))
    writer.abort()
    assert list_names(tmp_path / "pair") == ["pair.bin", "pair.idx"]


@pytest.mark.parametrize("num_steps", range(5))
@pytest.mark.parametrize("has_old_pair", [False, True])
def test_publishing_can_be_repeated_from_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int, has_old_pair: bool
) -> None:
    """Stops after each of the five changes on disk that `publish` makes: an unlink, two renames, two unlinks."""
    expected = read_bytes(write_pair(tmp_path / "expected"))
    if has_old_pair:
        with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as old_writer:
            add_document(old_writer, np.arange(9))  # as many tokens as the new pair
    writer = add_rest(IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)))
    state = writer.sync()
    writer.finish()
    remaining = [num_steps]

    def count_step(function):
        def counted(*args: object, **kwargs: object) -> object:
            if remaining[0] == 0:
                raise KeyboardInterrupt
            remaining[0] -= 1
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", count_step(Path.unlink))
        patch.setattr(Path, "replace", count_step(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            writer.publish()
    if num_steps in (1, 2):  # between the two ends of `publish`, there is no pair that opens
        assert not idx_path(tmp_path / "pair").exists()
    resumed = IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), state)
    resumed.finish()
    resumed.publish()
    resumed.abort()
    assert read_bytes(tmp_path / "pair") == expected
    assert list_names(tmp_path / "pair") == ["expected.bin", "expected.idx", "pair.bin", "pair.idx"]
    again = IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), state)
    again.finish()
    again.publish()
    assert read_bytes(tmp_path / "pair") == expected


@pytest.mark.parametrize(
    "stream, size_bytes, found", [("bin", 4, "3 bytes"), ("lengths", 8, "3 bytes"), ("documents", 16, "no file")]
)
def test_partial_files_shorter_than_recorded_are_named(
    tmp_path: Path, stream: str, size_bytes: int, found: str
) -> None:
    writer = IndexedWriter(tmp_path / "pair", np.dtype(np.uint16))
    add_document(writer, np.array([1]))
    add_document(writer, np.array([2]))
    state = writer.sync()
    writer.close()
    path = tmp_path / f"pair.{stream}.partial"
    content = path.read_bytes()
    path.unlink()
    if found != "no file":
        path.write_bytes(content[:3])
    with pytest.raises(DataError) as caught:
        IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), state)
    assert_problem(str(caught.value), f"{path}:", f"the first {size_bytes} bytes", f"got {found}")
    assert [part.stat().st_size for part in tmp_path.iterdir() if part != path]


def test_a_published_pair_of_another_run_is_not_mistaken_for_this_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "pair")
    before = read_bytes(tmp_path / "pair")
    with pytest.raises(DataError, match=r"pair.bin.partial: file must hold the first 18 bytes .* got no file."):
        IndexedWriter(tmp_path / "pair", np.dtype(np.uint16), WriterState(9, 4, 5))
    assert read_bytes(tmp_path / "pair") == before


@pytest.mark.parametrize("num_bytes", [216, 217])
def test_a_prefix_that_leaves_no_room_for_its_manifest_is_refused_before_any_work(
    tmp_path: Path, num_bytes: int
) -> None:
    prefix = tmp_path / ("é" * 100 + "n" * (num_bytes - 200))
    if num_bytes == 217:
        with raises_problem(OutputError, f"{prefix}:", "must have at most 255 bytes", "got 256"):
            IndexedWriter(prefix, np.dtype(np.uint16))
        assert list(tmp_path.iterdir()) == []
    else:
        with IndexedWriter(prefix, np.dtype(np.uint16)):
            publish_files({manifest_path(prefix): b"{}"})
