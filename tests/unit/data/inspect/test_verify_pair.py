"""Every kind of damage to a pair is found, and the message names the file."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.manifest import Manifest, TokenizerIdentity, encode_manifest, hash_file, manifest_path
from megatron_hammer.data.indexed.pair import IndexedWriter, bin_path, idx_path, read_index
from megatron_hammer.data.inspect import verify_pair as verify
from megatron_hammer.data.inspect.verify_pair import VerifiedPair, verify_pair
from megatron_hammer.errors import DataError
from tests.helpers.indexed_writing import add_document
from tests.helpers.messages import assert_problem, assert_problems

DOCUMENTS = ([5, 6, 7], [], [8], [1, 299, 3, 4, 9], [2, 2, 2, 2], [])
OTHER_DOCUMENTS = ([7, 6, 5], [], [8], [1, 298, 3, 4, 9], [2, 2, 2, 2], [])
NUM_SEQUENCES = 4
OFFSETS_START = 34 + 4 * NUM_SEQUENCES
DOCUMENTS_START = 34 + 12 * NUM_SEQUENCES


def write_pair(prefix: Path, documents: tuple[list[int], ...] = DOCUMENTS, dtype: type = np.int32) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for ids in documents:
            add_document(writer, np.array(ids, dtype=np.int64))
    return prefix


def write_manifest(prefix: Path, **changes: object) -> Path:
    """A manifest of the pair as it is now, but for the changes."""
    index = read_index(prefix)
    manifest = Manifest(
        sources=(),
        ignored_files=(),
        tokenizer=TokenizerIdentity(name="toy.model", sha256="0" * 64, vocab_size=300),
        options={},
        dtype=index.dtype.name,
        num_documents=index.num_documents,
        num_sequences=index.num_sequences,
        num_tokens=index.num_tokens,
        text_bytes=1,
        num_empty_documents=2,
        problems=(),
        bin_sha256=hash_file(bin_path(prefix)),
        idx_sha256=hash_file(idx_path(prefix)),
        tool_version="test",
    )
    manifest_path(prefix).write_bytes(encode_manifest(dataclasses.replace(manifest, **changes)))
    return prefix


def overwrite(path: Path, offset_bytes: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset_bytes)
        file.write(content)


@pytest.fixture(params=[1, 2, 1 << 20])
def prefix(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair without a manifest, read in chunks of one, two or all entries."""
    monkeypatch.setattr(verify, "SCAN_CHUNK_ENTRIES", request.param)
    monkeypatch.setattr(verify, "SCAN_CHUNK_BYTES", 4 * request.param)
    return write_pair(tmp_path / "pair")


def test_a_sound_pair(prefix: Path) -> None:
    assert verify_pair(prefix) == VerifiedPair(has_hashes=False, problems=())
    write_manifest(prefix)
    done = []
    verified = verify_pair(prefix, vocab_size=300, on_progress=lambda *bytes_done: done.append(bytes_done))
    assert verified == VerifiedPair(has_hashes=True, problems=())
    assert done[-1] == (52, 52)
    write_manifest(prefix, bin_sha256=None, idx_sha256=None, num_sequences=None)  # of an earlier version
    assert verify_pair(prefix) == VerifiedPair(has_hashes=False, problems=())


def test_a_sound_pair_without_tokens(tmp_path: Path) -> None:
    assert not verify_pair(write_manifest(write_pair(tmp_path / "pair", ([], [])))).problems


def problem_of(prefix: Path, **options: int) -> str:
    (problem,) = verify_pair(prefix, **options).problems
    return problem


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize(
    "num_bytes, cause", [(51, "It is truncated"), (0, "It is truncated"), (56, "It has bytes too many")]
)
def test_a_bin_of_another_size(prefix: Path, has_manifest: bool, num_bytes: int, cause: str) -> None:
    if has_manifest:
        write_manifest(prefix)
    bin_path(prefix).write_bytes((bin_path(prefix).read_bytes() + bytes(8))[:num_bytes])
    assert_problem(
        problem_of(prefix),
        f"{prefix}.bin:",
        "size must be 52 bytes",
        "(13 tokens of 4 bytes in the .idx)",
        f"got {num_bytes}",
        cause,
    )


@pytest.mark.parametrize("has_manifest", [False, True])
@pytest.mark.parametrize("num_bytes", [0, 8, 33, 34, 100, 137])
def test_a_truncated_index(prefix: Path, has_manifest: bool, num_bytes: int) -> None:
    if has_manifest:
        write_manifest(prefix)
    content = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(content[:num_bytes])
    assert problem_of(prefix).startswith(f"{prefix}.idx: {'size' if num_bytes > 8 else 'file'} must ")


def test_an_extended_index(prefix: Path) -> None:
    with open(idx_path(prefix), "ab") as file:
        file.write(b"x")
    assert_problem(problem_of(prefix), f"{prefix}.idx:", "size must be 138 bytes", "got 139")


@pytest.mark.parametrize(
    "offset_bytes, value, width, expected",
    [
        (34 + 4, -1, 4, "sequence 1 must have a length of at least 0, got -1."),
        (34 + 4, 2, 4, "sequence 2 must start at byte 20, where the lengths before it end, got 16."),
        (OFFSETS_START, 4, 8, "sequence 0 must start at byte 0, where the lengths before it end, got 4."),
        (OFFSETS_START + 16, 20, 8, "sequence 2 must start at byte 16, where the lengths before it end, got 20."),
        (DOCUMENTS_START, 1, 8, "document index must start at 0, got 1."),
        (DOCUMENTS_START + 8, 0, 8, None),
        (DOCUMENTS_START + 24, 0, 8, "document 2 must end at a sequence in 1..4, got 0."),
        (DOCUMENTS_START + 16, 5, 8, "document 1 must end at a sequence in 1..4, got 5."),
        (DOCUMENTS_START + 48, 3, 8, "document 5 must end at a sequence in 4..4, got 3."),
    ],
)
def test_an_index_that_contradicts_itself(
    prefix: Path, offset_bytes: int, value: int, width: int, expected: str | None
) -> None:
    overwrite(idx_path(prefix), offset_bytes, value.to_bytes(width, "little", signed=True))
    if expected is None:  # another document index that may be; only the manifest can tell
        assert not verify_pair(prefix).problems
    else:
        assert_problem(problem_of(prefix), f"{prefix}.idx: {expected}")


def test_a_document_index_that_ends_too_early(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", ([1], [2]))
    overwrite(idx_path(prefix), 34 + 24 + 16, (1).to_bytes(8, "little"))
    assert_problem(problem_of(prefix), f"{prefix}.idx:", "document index must end at sequence 2", "got 1")


def test_ids_beyond_the_vocabulary(prefix: Path) -> None:
    assert_problem(
        problem_of(prefix, vocab_size=299), f"{prefix}.bin:", "token ids must be below", "got id=299, vocab_size=299"
    )
    write_manifest(prefix, tokenizer=TokenizerIdentity(name="toy.model", sha256="0" * 64, vocab_size=200))
    assert "must be below vocab_size of toy.model, got id=299, vocab_size=200." in problem_of(prefix)
    assert not verify_pair(prefix, vocab_size=300).problems
    overwrite(bin_path(prefix), 8, (-7).to_bytes(4, "little", signed=True))
    manifest_path(prefix).unlink()
    assert_problem(problem_of(prefix), f"{prefix}.bin:", "token ids must be at least 0", "got id=-7")


def test_tokens_that_are_not_integers(prefix: Path) -> None:
    overwrite(idx_path(prefix), 17, b"\x07")
    assert_problem(problem_of(prefix), f"{prefix}.idx:", "tokens must be integers", "got dtype=float32")


def flip_bit(path: Path, offset_bytes: int) -> None:
    overwrite(path, offset_bytes, bytes([path.read_bytes()[offset_bytes] ^ 1]))


def test_every_flipped_bit_is_named_by_its_file(tmp_path: Path) -> None:
    prefix = write_manifest(write_pair(tmp_path / "pair"))
    for path in (bin_path(prefix), idx_path(prefix)):
        for offset_bytes in range(path.stat().st_size):
            flip_bit(path, offset_bytes)
            problems = verify_pair(prefix).problems
            assert any(problem.startswith(f"{path}: ") for problem in problems), offset_bytes
            flip_bit(path, offset_bytes)
    assert not verify_pair(prefix).problems


def test_files_of_another_pair_of_the_same_size(tmp_path: Path) -> None:
    prefix = write_manifest(write_pair(tmp_path / "pair"))
    other = write_pair(tmp_path / "other", OTHER_DOCUMENTS)
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(bin_path(other).read_bytes())
    expected, actual = hashlib.sha256(content).hexdigest()[:12], hash_file(bin_path(other))[:12]
    assert_problem(problem_of(prefix), f"{prefix}.bin:", "content must have the SHA-256", expected, f"got {actual}")
    third = write_pair(tmp_path / "third", ([5, 6], [1], [], [8, 299, 3, 4, 9, 1], [2, 2, 2, 2], []))
    bin_path(prefix).write_bytes(content)
    idx_path(prefix).write_bytes(idx_path(third).read_bytes())
    assert problem_of(prefix).startswith(f"{prefix}.idx: content must have the SHA-256 ")
    bin_path(prefix).write_bytes(bin_path(third).read_bytes())
    assert_problem(
        problem_of(prefix), f"{prefix}.manifest.json:", "must describe the files", "got the SHA-256 of others for both"
    )


def test_counts_of_the_manifest(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair")
    write_manifest(prefix, dtype="uint16", num_documents=7, num_sequences=5, num_tokens=14)
    assert_problems(
        verify_pair(prefix).problems,
        (f"{prefix}.idx: dtype", "uint16, as in pair.manifest.json", "got int32"),
        (f"{prefix}.idx: num_documents", "7, as in pair.manifest.json", "got 6"),
        (f"{prefix}.idx: num_sequences", "5, as in pair.manifest.json", "got 4"),
        (f"{prefix}.idx: num_tokens", "14, as in pair.manifest.json", "got 13"),
    )


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    prefix = write_manifest(write_pair(tmp_path / "pair"))
    overwrite(idx_path(prefix), 34, (-1).to_bytes(4, "little", signed=True))
    overwrite(idx_path(prefix), DOCUMENTS_START + 8, (5).to_bytes(8, "little"))
    bin_path(prefix).write_bytes(np.array([1, 400], dtype=np.int32).tobytes())
    starts = ("idx: sequence 0 must", "idx: document 0 must", "bin: size must be 52 bytes (13 tokens", "bin: token ids")
    problems = verify_pair(prefix).problems
    assert len(problems) == 4
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(f"{prefix}.{start}")
    assert "of 4 bytes in the manifest), got 8." in problems[2]


@pytest.mark.parametrize("path_of", [bin_path, idx_path])
def test_a_missing_file_is_named_and_the_other_one_is_read(tmp_path: Path, path_of: Callable[[Path], Path]) -> None:
    prefix = write_manifest(write_pair(tmp_path / "pair"))
    path_of(prefix).unlink()
    other = idx_path if path_of is bin_path else bin_path
    with open(other(prefix), "ab") as file:
        file.write(b"x")
    assert_problems(
        verify_pair(prefix).problems,
        (f"{path_of(prefix)}:", "file does not exist"),
        (f"{other(prefix)}:", "size must be "),
    )


def test_a_manifest_that_does_not_parse(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair")
    manifest_path(prefix).write_text("{}")
    assert problem_of(prefix).startswith(f"{prefix}.manifest.json: format_version must be given, got nothing. ")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_pair(tmp_path / "pair")

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(verify, "_scan_ids", refuse)
    with pytest.raises(DataError, match=r"pair.bin: file cannot be read \(Permission denied\). Check the path"):
        verify_pair(prefix)
