import hashlib
import json
import random
from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files.torch_dist.content_hashes import (
    HASHES_FILE,
    FileHash,
    HashingFile,
    find_damage,
    find_wrong_files,
    hash_file,
    read_hashes,
    require_intact,
    select_share,
    select_small_files,
    write_hashes,
)
from megatron_hammer.errors import CheckpointError
from tests.helpers.messages import assert_problem

CONTENTS = {
    ".metadata": b"m" * 300,
    "__0_0.distcp": bytes(range(256)) * 40,
    "__1_0.distcp": b"",
    "metadata.json": b"{}",
}


@pytest.fixture
def iteration(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    write_hashes(tmp_path)
    return tmp_path


def test_a_written_file_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    parts = [b"", b"abc", memoryview(bytes(100_000)), b"d" * 9000]
    with HashingFile(tmp_path / "file") as file:
        for part in parts:
            assert file.write(part) == len(part)
        file.fileno()  # before a sync: nothing may stay in the buffer
        assert (tmp_path / "file").stat().st_size == sum(map(len, parts))
    assert file.content == hash_file(tmp_path / "file")
    assert file.content == FileHash(hashlib.sha256(b"".join(parts)).hexdigest(), 109_003)


def test_all_files_are_hashed_but_known_ones_are_not_read(tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    known = FileHash("a" * 64, 3)
    assert write_hashes(tmp_path, {"__0_0.distcp": known, "gone": known}) == 300 + 3 + 0 + 2
    hashes = read_hashes(tmp_path)
    assert hashes is not None
    assert set(hashes) == set(CONTENTS)
    assert hashes["__0_0.distcp"] == known
    assert hashes[".metadata"] == FileHash(hashlib.sha256(CONTENTS[".metadata"]).hexdigest(), 300)


def test_an_intact_iteration_has_no_problem(iteration: Path) -> None:
    hashes = read_hashes(iteration)
    assert hashes is not None
    assert find_wrong_files(iteration, hashes) == find_damage(iteration, hashes) == []
    assert require_intact(iteration)
    (iteration / "notes.txt").write_text("a user's own")
    assert require_intact(iteration)


def test_every_flipped_bit_is_found_and_its_file_named(iteration: Path) -> None:
    generator = random.Random(3)
    for _ in range(60):
        path = iteration / generator.choice([name for name, content in CONTENTS.items() if content])
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            require_intact(iteration)
        (problem,) = error.value.problems
        assert_problem(problem, f"{path}:", "must have the contents that were saved", "use another iteration")
        path.write_bytes(CONTENTS[path.name])


def test_missing_cut_and_added_files_are_found_without_reading(iteration: Path) -> None:
    (iteration / ".metadata").unlink()
    (iteration / "__0_0.distcp").write_bytes(b"short")
    for name in ("common.pt", "__3_0.distcp", "__0.metadata"):
        (iteration / name).write_bytes(b"x")
    problems = find_wrong_files(iteration, read_hashes(iteration) or {})
    assert [problem.split(": must ")[0].rpartition("/")[2] for problem in problems] == [
        ".metadata", "__0_0.distcp", "__0.metadata", "__3_0.distcp", "common.pt",
    ]  # fmt: skip
    assert "must hold the 300 bytes that were saved, got no such file" in problems[0]
    assert "must hold the 10240 bytes that were saved, got 5." in problems[1]
    assert "got no hash of it. Remove it" in problems[-1]


def test_an_iteration_without_hashes_is_told_from_one_with_damaged_ones(iteration: Path) -> None:
    content = json.loads((iteration / HASHES_FILE).read_text())
    digest = "b" * 64
    for damaged in (
        "",
        "[]",
        '{"algorithm": "sha256"}',
        json.dumps(content | {"algorithm": "md5"}),
        json.dumps(content | {"files": {"../x": digest}}),
        json.dumps(content | {"files": {"x": "short"}}),
        json.dumps(content | {"files": {"x": 3}}),
        json.dumps(content | {"files": {"x": digest}, "sizes": {"x": "3"}}),
        json.dumps(content | {"files": {"x": digest}}),
        json.dumps({("sizez" if name == "sizes" else name): value for name, value in content.items()}),
        "[" * 100_000,
    ):
        (iteration / HASHES_FILE).write_text(damaged)
        with pytest.raises(CheckpointError, match=rf"{HASHES_FILE}: must hold the sha256 of each file"):
            read_hashes(iteration)
    (iteration / HASHES_FILE).unlink()
    assert read_hashes(iteration) is None
    assert not require_intact(iteration)


def test_megatrons_own_file_has_no_sizes(iteration: Path) -> None:
    content = json.loads((iteration / HASHES_FILE).read_text())
    del content["sizes"]
    (iteration / HASHES_FILE).write_text(json.dumps(content))
    assert require_intact(iteration)
    (iteration / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"metadata\.json: must exist, got no such file"):
        require_intact(iteration)


def test_megatron_verifies_our_hashes(iteration: Path) -> None:
    validation = pytest.importorskip("megatron.core.dist_checkpointing.validation")
    validation._verify_integrity_manifest_impl(str(iteration))
    (iteration / "metadata.json").write_text("[]")
    with pytest.raises(Exception, match="hash mismatch"):
        validation._verify_integrity_manifest_impl(str(iteration))


def test_shares_cover_every_file_once_and_are_of_like_size() -> None:
    hashes = {f"__{i}_0.distcp": FileHash("c" * 64, (i + 1) * 1000) for i in range(17)} | {
        "m": FileHash("d" * 64, None)
    }
    shares = [select_share(hashes, index=index, num_shares=4) for index in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(hashes)
    loads = [sum(content.num_bytes or 0 for content in share.values()) for share in shares]
    assert max(loads) - min(loads) <= 17_000
    assert list(select_small_files(hashes)) == ["m"]
