"""Files are hashed beside other work, and an unreadable one is an error."""

from pathlib import Path

import pytest

from megatron_hammer.data.indexed.file_hasher import FileHasher
from megatron_hammer.data.indexed.manifest import describe_source
from megatron_hammer.errors import DataError


def test_hashes_are_those_of_the_files_in_the_order_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number * 1000)
    with FileHasher() as hasher:
        hasher.complete(paths[1:2])
        hasher.complete(paths[:2])
        assert hasher.finish(paths) == tuple(describe_source(path) for path in paths)


def test_a_file_that_grows_is_hashed_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with FileHasher() as hasher, path.open("wb", buffering=0) as file:
        for number in range(5):
            file.write(bytes([number]) * 1_500_000)
            hasher.follow(path, 1_500_000 * number + 700_000)
        hasher.follow(path, 10**9)  # beyond its end
        file.write(b"the rest")
        assert hasher.finish([path]) == (describe_source(path),)


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    message = r"a: file cannot be read \(No such file or directory\). Check the path"
    with FileHasher() as hasher, pytest.raises(DataError, match=message):
        hasher.finish([tmp_path / "a", tmp_path / "b"])
