"""Our .bin/.idx are Megatron's, byte for byte, and a damaged pair is named rather than trained on."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_hammer.data.indexed import IndexedWriter, bin_path, idx_path, read_index, select_dtype
from megatron_hammer.errors import DataError

DOCUMENTS = ([5, 6, 7], [], [8], [1, 65_000, 3, 4, 9], [])


def write_pair(prefix: Path, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for ids in DOCUMENTS:
            writer.add_document(np.array(ids, dtype=np.int64))
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


def test_megatron_reads_it(tmp_path: Path) -> None:
    dataset = IndexedDataset(str(write_pair(tmp_path / "pair")))
    assert [ids.tolist() for ids in dataset[:]] == [ids for ids in DOCUMENTS if ids]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 3, 3]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a.b.c", np.dtype(np.int32)) as writer:
        writer.add_document(np.array([4, 5, 6, 7, 8]), [2, 3])
        with pytest.raises(ValueError, match="sequence_lengths add up to 4, but there are 3 ids"):
            writer.add_document(np.array([4, 5, 6]), [2, 2])
    dataset = IndexedDataset(str(tmp_path / "a.b.c"))
    assert dataset.sequence_lengths.tolist() == [2, 3]
    assert dataset.document_indices.tolist() == [0, 2]


def test_ids_that_do_not_fit_are_a_bug_not_a_wrap_around(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=re.escape("token ids must lie in 0..65535, got 70000..70000")),
        IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document(np.array([70_000]))
    assert not list(tmp_path.iterdir())


def test_summary(tmp_path: Path) -> None:
    summary = read_index(write_pair(tmp_path / "pair"))
    assert (summary.num_documents, summary.num_sequences, summary.num_tokens) == (5, 3, 9)
    assert summary.dtype == np.uint16
    assert summary.max_token_id == 65_000
    assert summary.sequence_lengths.tolist() == [3, 1, 5]
    assert summary.document_index.tolist() == [0, 1, 1, 2, 3, 3]
    assert summary.tokens.tolist() == [5, 6, 7, 8, 1, 65_000, 3, 4, 9]


def test_summary_of_a_pair_without_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.int32)) as writer:
        writer.add_document(np.array([], dtype=np.int32))
    summary = read_index(tmp_path / "pair")
    assert (summary.num_documents, summary.num_tokens, summary.max_token_id) == (1, 0, -1)
    assert summary.sequence_lengths.tolist() == summary.tokens.tolist() == []


def test_megatrons_multimodal_index_is_read(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "pair.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [1, 2], [0, 1])
    builder.finalize(str(tmp_path / "pair.idx"))
    assert read_index(tmp_path / "pair").num_tokens == 3


def error_of(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_index(prefix)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write_pair(tmp_path / "pair")
    Path(f"{prefix}.{suffix}").unlink()
    assert error_of(prefix) == (
        f"{prefix}.{suffix}: file does not exist. Pass the prefix of a .bin/.idx pair without its suffix, "
        "or write the pair with tools/preprocess_data.py."
    )


@pytest.mark.parametrize("change", [b"", b"\x00\x00\x00\x00"])
def test_bin_of_another_size_is_named(tmp_path: Path, change: bytes) -> None:
    prefix = write_pair(tmp_path / "pair")
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content + change if change else content[:-1])
    assert error_of(prefix) == (
        f"{prefix}.bin: size must be 18 bytes (9 tokens of 2 bytes in the .idx), got {22 if change else 17}. "
        "The pair is truncated or mixed; preprocess or copy it again."
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


def test_nothing_looks_finished_until_it_is(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "pair"
    writer = IndexedWriter(prefix, np.dtype(np.int32))
    writer.add_document(np.array([1, 2]))
    assert [path.name for path in prefix.parent.iterdir()] == ["pair.bin.partial"]
    writer.finish()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["pair.bin.partial", "pair.idx.partial"]
    writer.publish()
    writer.abort()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["pair.bin", "pair.idx"]


def test_an_exception_leaves_the_old_pair_and_no_new_one(tmp_path: Path) -> None:
    before = read_bytes(write_pair(tmp_path / "pair"))

    def write_and_stop() -> None:
        with IndexedWriter(tmp_path / "pair", np.dtype(np.int32)) as writer:
            writer.add_document(np.array([1, 2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert read_bytes(tmp_path / "pair") == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"pair.{suffix}.partial").symlink_to("/dev/full")
        with pytest.raises(
            DataError, match=rf"pair.{suffix}.partial: file cannot be written \(No space left on device"
        ):
            write_pair(tmp_path / "pair")
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"pair.bin.partial: file cannot be written \(File exists\). Free space, or"):
        IndexedWriter(tmp_path / "file" / "pair", np.dtype(np.int32))
