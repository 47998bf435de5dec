"""Merged parts equal the merge of Megatron byte for byte, shards give the bytes of one job, and mismatches named."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_hammer.data.indexed.manifest import (
    JobShard,
    Manifest,
    SourceFile,
    TokenizerIdentity,
    encode_manifest,
    hash_file,
    manifest_path,
    read_manifest,
)
from megatron_hammer.data.indexed.pair import IndexedWriter, bin_path, idx_path, read_index
from megatron_hammer.data.indexed.shuffle import shuffle_pairs
from megatron_hammer.data.inspect.verify_pair import verify_pair
from megatron_hammer.data.merge import merge_pairs as merge
from megatron_hammer.data.merge.merge_pairs import merge_pairs
from megatron_hammer.data.preprocess.journal import lock_outputs
from megatron_hammer.errors import DataError
from tests.helpers.indexed_writing import add_document
from tests.helpers.messages import assert_problem, assert_problems
from tests.helpers.privileges import folder_of_everyone, without_privileges

# The sequences of each document, of a whole job; ids are their own place in the job.
DOCUMENTS = ((3,), (), (2, 1, 4), (5,), (), (1, 1), (60,), (2,), (7,), (1,), (9, 9))
CUTS = (0, 4, 5, 11)  # three shards, the second of one empty document
SOURCES = tuple(SourceFile(path=f"c{k}.jsonl", size_bytes=10 + k, sha256=str(k) * 64) for k in range(3))
SHARD_SOURCES = (SOURCES[:2], SOURCES[1:2], SOURCES[1:])
OPTIONS = {"json_key": "text", "append_eod": False, "shuffle": False, "seed": None}
TOKENIZER = TokenizerIdentity(name="toy.model", sha256="a" * 64, vocab_size=300)


def write_pair(prefix: Path, first: int = 0, last: int = len(DOCUMENTS), dtype: type = np.uint16) -> Path:
    first_id = sum(map(sum, DOCUMENTS[:first]))
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for lengths in DOCUMENTS[first:last]:
            add_document(writer, np.arange(first_id, first_id + sum(lengths)), lengths)
            first_id += sum(lengths)
    return prefix


def write_manifest(prefix: Path, **changes: object) -> Path:
    index = read_index(prefix)
    manifest = Manifest(
        sources=SOURCES,
        ignored_files=("corpus/README",),
        tokenizer=TOKENIZER,
        options=OPTIONS,
        dtype=index.dtype.name,
        num_documents=index.num_documents,
        num_sequences=index.num_sequences,
        num_tokens=index.num_tokens,
        text_bytes=7 * index.num_documents,
        num_empty_documents=int((np.diff(index.document_index) == 0).sum()),
        problems=(),
        bin_sha256=hash_file(bin_path(prefix)),
        idx_sha256=hash_file(idx_path(prefix)),
        tool_version="1.0",
    )
    manifest_path(prefix).write_bytes(encode_manifest(dataclasses.replace(manifest, **changes)))
    return prefix


def write_shards(folder: Path) -> list[Path]:
    shards = []
    for k in range(3):
        prefix = write_pair(folder / f"part{k}", CUTS[k], CUTS[k + 1])
        problems = (f"c{k}.jsonl:1: bad",) if k != 1 else ()
        shards.append(write_manifest(prefix, shard=JobShard(k, 3), sources=SHARD_SOURCES[k], problems=problems))
    return shards


def write_whole(prefix: Path, **changes: object) -> Path:
    return write_manifest(write_pair(prefix), problems=("c0.jsonl:1: bad", "c2.jsonl:1: bad"), **changes)


def read_bytes(prefix: Path) -> tuple[bytes, ...]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes(), manifest_path(prefix).read_bytes()


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- good parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 24])
def test_plain_parts_equal_megatrons_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(merge, "COPY_CHUNK_BYTES", chunk_bytes)
    parts = [write_pair(tmp_path / f"part{k}", CUTS[k], CUTS[k + 1]) for k in range(3)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for k in (2, 0, 1):
        builder.add_index(str(parts[k]))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merged = merge_pairs([str(parts[k]) for k in (2, 0, 1)], tmp_path / "ours")
    for path_of in (bin_path, idx_path):
        assert path_of(tmp_path / "ours").read_bytes() == path_of(tmp_path / "theirs").read_bytes()
    assert merged.parts == (parts[2], parts[0], parts[1])
    assert (merged.num_documents, merged.num_sequences, merged.num_tokens) == (11, 13, 105)
    assert merged.manifest is None
    assert_problems(merged.warnings, ("parts:", "no part has a manifest"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_in_any_order_give_the_bytes_of_one_job(tmp_path: Path, order: tuple[int, ...]) -> None:
    shards = write_shards(tmp_path)
    moved = []
    merged = merge_pairs(
        [str(shards[k]) for k in order], tmp_path / "new" / "merged", on_progress=lambda *done: moved.append(done)
    )
    assert read_bytes(tmp_path / "new" / "merged") == read_bytes(write_whole(tmp_path / "whole"))
    assert merged.parts == tuple(shards)
    assert merged.warnings == ()
    assert moved[-1] == (210, 210)
    assert list_names(tmp_path / "new") == ["merged.bin", "merged.idx", "merged.manifest.json"]
    assert not verify_pair(tmp_path / "new" / "merged").problems


def test_a_merge_that_keeps_the_order_of_its_inputs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin of the test above."""
    shards = write_shards(tmp_path)
    monkeypatch.setattr(merge, "order_parts", lambda parts: parts)
    merge_pairs([str(shards[k]) for k in (2, 0, 1)], tmp_path / "merged")
    whole = read_bytes(write_whole(tmp_path / "whole"))
    for ours, expected in zip(read_bytes(tmp_path / "merged"), whole, strict=True):
        assert ours != expected


def test_shards_merged_with_shuffle_give_the_bytes_of_one_shuffled_job(tmp_path: Path) -> None:
    write_pair(tmp_path / "ordered")
    with IndexedWriter(tmp_path / "whole", np.dtype(np.uint16)) as writer:
        shuffle_pairs([read_index(tmp_path / "ordered")], [writer], seed=5, work_dir=tmp_path / "buckets")
    assert read_bytes_of_pair(tmp_path / "whole") != read_bytes_of_pair(tmp_path / "ordered")
    write_manifest(
        tmp_path / "whole",
        problems=("c0.jsonl:1: bad", "c2.jsonl:1: bad"),
        options=OPTIONS | {"shuffle": True, "seed": 5},
    )
    shards = [str(shard) for shard in write_shards(tmp_path)]
    moved = []
    merge_pairs(shards, tmp_path / "merged", seed=5, on_progress=lambda *done: moved.append(done))
    assert read_bytes(tmp_path / "merged") == read_bytes(tmp_path / "whole")
    assert moved[-1] == (420, 420)
    merge_pairs(shards, tmp_path / "merged", seed=6)
    assert read_bytes(tmp_path / "merged") != read_bytes(tmp_path / "whole")
    assert not [name for name in list_names(tmp_path) if "partial" in name]


def read_bytes_of_pair(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def test_the_manifest_of_parts_that_are_no_shards(tmp_path: Path) -> None:
    write_manifest(write_pair(tmp_path / "a", 0, 4), sources=SOURCES[:1], tool_version="1.1")
    options = OPTIONS | {"json_key": "content", "shuffle": True, "seed": 7}
    write_manifest(write_pair(tmp_path / "b", 4, 11), sources=SOURCES[:1], options=options)
    merged = merge_pairs([str(tmp_path / "b"), str(tmp_path / "a")], tmp_path / "merged")
    manifest = merged.manifest
    assert manifest == read_manifest(tmp_path / "merged")
    assert manifest is not None
    assert manifest.sources == SOURCES[:1] * 2
    assert manifest.options == OPTIONS | {
        "json_key": ["content", "text"],
        "shuffle": "within each part",
        "seed": [7, None],
    }
    assert (manifest.num_documents, manifest.num_empty_documents, manifest.text_bytes) == (11, 2, 77)
    assert manifest.tool_version == "1.0, 1.1"
    assert manifest.ignored_files == ("corpus/README",)
    assert_problems(merged.warnings, ("parts:", "different versions", "1.0, 1.1"))


def test_a_copied_part_is_a_warning(tmp_path: Path) -> None:
    first = write_manifest(write_pair(tmp_path / "a"))
    second = write_manifest(write_pair(tmp_path / "b"))
    merged = merge_pairs([str(first), str(second)], tmp_path / "merged")
    assert_problems(merged.warnings, (f"{second}:", "holds the same ids", f"{first}"))


def test_an_old_manifest_does_not_stay_beside_a_new_pair_without_one(tmp_path: Path) -> None:
    write_whole(tmp_path / "merged")
    merge_pairs([str(write_pair(tmp_path / "a", 0, 3))], tmp_path / "merged")
    assert not manifest_path(tmp_path / "merged").exists()
    assert read_index(tmp_path / "merged").num_documents == 3


# --- which parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["{0}", "{0}/part*", "{0}/part*.idx", "{0}/part?", "{0}/part*.bin", "{0}/part[0-9].idx"]
)
def test_inputs_may_be_folders_and_patterns(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "parts").mkdir()
    shards = write_shards(tmp_path / "parts")
    merged = merge_pairs([pattern.format(tmp_path / "parts")], tmp_path / "merged")
    assert merged.parts == tuple(shards)


def test_inputs_may_be_files_and_names_with_brackets(tmp_path: Path) -> None:
    parts = [write_pair(tmp_path / name, 0, 3) for name in ("a.b", "c[1]", "d")]
    merged = merge_pairs([f"{parts[0]}.idx", str(parts[1]), f"{parts[2]}.bin"], tmp_path / "merged")
    assert merged.parts == tuple(parts)


def test_a_pattern_may_be_expanded_by_the_shell(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    shards = write_shards(tmp_path / "parts")
    inputs = sorted(map(str, (tmp_path / "parts").iterdir()))
    assert len(inputs) == 9
    assert merge_pairs(inputs, tmp_path / "merged").parts == tuple(shards)


def problems_of(inputs: list[Path | str], output_prefix: Path, seed: int | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        merge_pairs(list(map(str, inputs)), output_prefix, seed=seed)
    return list(caught.value.problems)


def test_inputs_that_match_nothing_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "a.bin").touch()
    (tmp_path / "half" / "b.bin.partial").touch()
    part = write_pair(tmp_path / "part")
    (tmp_path / "link.bin").symlink_to(bin_path(part))
    inputs = [tmp_path / "empty", tmp_path / "x*", tmp_path / "half", part, f"{part}.idx", tmp_path / "link"]
    assert_problems(
        problems_of(inputs, tmp_path / "merged"),
        (f"{tmp_path}/empty:", "directory must hold a .bin/.idx", "got none"),
        (f"{tmp_path}/x*:", "pattern must match an .idx", "got none"),
        (f"{tmp_path}/half/a.bin:", "part must have an .idx", "got none"),
        (
            f"{tmp_path}/half/b.bin.partial:",
            "part must be finished",
            "got one that is being written or was interrupted",
        ),
        (f"{part}:", "part must be named once", f"got it as {part} before"),
        (f"{tmp_path}/link:", "part must be named once", f"got it as {part} before"),
    )


def test_parts_in_folders_that_cannot_be_read_are_not_taken_for_absent() -> None:
    with folder_of_everyone() as folder:
        write_pair(folder / "part")
        (folder / "closed").mkdir()
        write_pair(folder / "closed" / "part")
        os.chmod(folder / "closed", 0o000)
        with without_privileges():
            for item in ("closed", "*/*", "closed/p*"):
                problems = problems_of([folder / "part", folder / item], folder / "merged")
                assert_problems(problems, (f"{folder}/closed", "input must be readable", "Permission denied"))


def test_the_output_must_not_be_a_part(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_pair(tmp_path / "merged")
    assert_problems(
        problems_of([tmp_path], tmp_path / "x" / ".." / "merged"),
        (
            f"{tmp_path}/merged:",
            "output must not be one of its parts",
            f"got it as --output-prefix and from {tmp_path}",
            "--output-prefix",
        ),
    )
    for path in tmp_path.glob("merged.*"):
        path.unlink()
    (tmp_path / "merged.bin.partial").touch()  # left by a merge that was killed
    assert merge_pairs([str(tmp_path)], tmp_path / "merged").num_documents == 11


def test_a_part_that_does_not_exist_is_named(tmp_path: Path) -> None:
    problems = problems_of([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert [problem.split(": ")[0] for problem in problems] == [f"{tmp_path}/a.bin", f"{tmp_path}/b.bin"]
    assert problems[0].startswith(f"{tmp_path}/a.bin: file does not exist. Pass the prefix of a .bin/.idx pair")


# --- parts that do not match -----------------------------------------------------------------------------------------


def change_manifest(prefix: Path, **changes: object) -> None:
    manifest = read_manifest(prefix)
    assert manifest is not None
    manifest_path(prefix).write_bytes(encode_manifest(dataclasses.replace(manifest, **changes)))


def test_conversations_are_no_parts(tmp_path: Path) -> None:
    """The merge knows nothing of their masks."""
    parts = [write_pair(tmp_path / name) for name in ("chat", "chat_loss_mask", "text")]
    with pytest.raises(DataError) as caught:
        merge_pairs([str(parts[0]), str(parts[2])], tmp_path / "merged")
    (problem,) = caught.value.problems
    assert_problem(problem, f"{parts[0]}: part must not be conversations", "whose masks a merge would lose")


def test_another_dtype(tmp_path: Path) -> None:
    first, second = write_pair(tmp_path / "a"), write_pair(tmp_path / "b", dtype=np.int32)
    assert_problems(
        problems_of([first, second], tmp_path / "merged"),
        (f"{second}:", "dtype must be uint16", f"{first}", "got int32"),
    )


def test_another_tokenizer_and_other_options(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    change_manifest(shards[1], tokenizer=dataclasses.replace(TOKENIZER, name="other.model", sha256="b" * 64))
    change_manifest(shards[2], options=OPTIONS | {"append_eod": True, "json_key": "content", "prepend_bos": False})
    assert_problems(
        problems_of(shards, tmp_path / "merged"),
        (f"{shards[1]}: tokenizer", f"{shards[0]}, toy.model (aaaaaaaaaaaa)", "got other.model (bbbbbbbbbbbb)"),
        (f"{shards[2]}: option append_eod", f"be off, as of {shards[0]}", "got on", "options of the others"),
        (f"{shards[2]}: option json_key", f"be text, as of {shards[0]}", "got content", "shards of each key"),
        (f"{shards[2]}: option prepend_bos", f"be nothing, as of {shards[0]}", "got off", "options of the others"),
    )
    assert not list(tmp_path.glob("merged*"))


def test_a_part_without_a_manifest_among_others(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    manifest_path(shards[0]).unlink()
    problems = problems_of(shards, tmp_path / "merged")
    assert_problem(problems[0], f"{shards[0]}:", "part must have a manifest", f"{shards[1]}", "got none")


@pytest.mark.parametrize("given, missing", [((0, 2), "1"), ((1,), "0, 2")])
def test_missing_shards(tmp_path: Path, given: tuple[int, ...], missing: str) -> None:
    shards = write_shards(tmp_path)
    assert_problems(
        problems_of([shards[k] for k in given], tmp_path / "merged"),
        ("input:", "shards 0 to 2 of 3", f"got no {missing}", "--shard", "--input"),
    )


def test_many_missing_shards_are_cut_short(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    change_manifest(shards[1], shard=JobShard(1, 40))
    (problem,) = problems_of([shards[1]], tmp_path / "merged")
    assert "got no 0, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 29 more." in problem


def test_shards_that_are_there_twice_or_of_another_job(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    copy = tmp_path / "copy"
    for path_of in (bin_path, idx_path, manifest_path):
        shutil.copy(path_of(shards[1]), path_of(copy))
    other = write_manifest(write_pair(tmp_path / "other"), shard=JobShard(0, 4))
    whole = write_whole(tmp_path / "whole")
    change_manifest(shards[2], sources=(dataclasses.replace(SOURCES[1], sha256="f" * 64), SOURCES[2]))
    assert_problems(
        problems_of([*shards, copy, other, whole], tmp_path / "merged"),
        (f"{whole}:", "part must be a shard", f"{shards[0]}", "got a whole job"),
        (f"{copy}:", "shard 1/3 must come once", f"got {shards[1]} too"),
        (f"{other}:", "shard must be one of 3", f"{shards[0]}", "got 0/4"),
        (
            f"{shards[2]}:",
            f"source c1.jsonl must be the one that {shards[0]}",
            "got SHA-256 ffffffffffff where that is 111111111111",
        ),
    )


def test_a_manifest_of_another_pair(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    shutil.copy(manifest_path(shards[0]), tmp_path / "kept")
    change_manifest(shards[0], num_tokens=99)
    assert_problems(
        problems_of(shards, tmp_path / "merged"),
        (f"{shards[0]}.manifest.json:", "num_tokens must be that of the pair", "got 99 where the pair has 15"),
    )


def test_multimodal_parts(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "part.bin"), dtype=np.uint16, multimodal=True)
    builder.add_document(np.array([1, 2, 3]), [1, 2], [0, 1])
    builder.finalize(str(tmp_path / "part.idx"))
    assert_problems(
        problems_of([tmp_path / "part"], tmp_path / "merged"),
        (f"{tmp_path}/part:", "part must hold text alone", "got an index with modes"),
    )


# --- nothing is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("path_of, offset_bytes", [(bin_path, 0), (idx_path, 34 + 12 * 2)])
def test_a_damaged_part_is_named_and_leaves_the_old_result(
    tmp_path: Path, seed: int | None, path_of: Callable[[Path], Path], offset_bytes: int
) -> None:
    shards = write_shards(tmp_path)
    merge_pairs(list(map(str, shards)), tmp_path / "merged")
    before, names = read_bytes(tmp_path / "merged"), list_names(tmp_path)
    path = path_of(shards[2])
    content = bytearray(path.read_bytes())
    content[offset_bytes] ^= 1
    path.write_bytes(content)
    (problem,) = problems_of(shards, tmp_path / "merged", seed)
    assert problem.startswith(f"{path}: content must have the SHA-256 ")
    assert problem.endswith("It is damaged or of another pair; preprocess or copy it again.")
    assert read_bytes(tmp_path / "merged") == before
    assert list_names(tmp_path) == names


@pytest.mark.parametrize("seed", [None, 3])
def test_an_interrupt_leaves_nothing(tmp_path: Path, seed: int | None) -> None:
    shards = write_shards(tmp_path)
    names = list_names(tmp_path)

    def interrupt(done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_pairs(list(map(str, shards)), tmp_path / "merged", seed=seed, on_progress=interrupt)
    assert list_names(tmp_path) == names


def test_an_interrupt_while_publishing_leaves_no_manifest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path)
    names = list_names(tmp_path)

    def interrupt(writer: IndexedWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexedWriter, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_pairs(list(map(str, shards)), tmp_path / "merged")
    assert list_names(tmp_path) == names


def test_two_merges_into_the_same_output(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with lock_outputs(tmp_path / "merged.lock"):
        (problem,) = problems_of(shards, tmp_path / "merged")
    assert problem.startswith(f"{tmp_path}/merged.lock: another run is writing this output, got process ")


@pytest.mark.parametrize("seed, needed_bytes", [(None, 636), (3, 636 + 13 * 4 + 11 * 16 + (128 << 20))])
def test_a_disk_that_is_too_small_is_noticed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None, needed_bytes: int
) -> None:
    shards = write_shards(tmp_path)
    names = list_names(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (problem,) = problems_of(shards, tmp_path / "new" / "folder" / "merged", seed)
    assert_problem(
        problem, f"{tmp_path}/new/folder/merged:", f"folder must have {needed_bytes}", "got 100", "--output-prefix"
    )
    assert list_names(tmp_path) == names


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write_pair(tmp_path / "part")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(merge, "read_pair_documents", fail)
    assert_problems(problems_of([part], tmp_path / "merged"), (f"{part}:", "cannot be read (Input/output error)"))
