"""Files are hashed beside other work, and an unreadable one is an error."""

from pathlib import Path

import pytest

from megatron_hammer.data.manifest import describe_source
from megatron_hammer.data.source_hasher import SourceHasher
from megatron_hammer.errors import DataError


def test_hashes_are_those_of_the_files_in_the_order_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number * 1000)
    with SourceHasher() as hasher:
        hasher.add(paths[1:2])
        hasher.add(paths[:2])
        assert hasher.finish(paths) == tuple(describe_source(path) for path in paths)


def test_a_file_that_vanished_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    message = r"a: file must be readable to its end, got: No such file or directory. Check it."
    with SourceHasher() as hasher, pytest.raises(DataError, match=message):
        hasher.finish([tmp_path / "a", tmp_path / "b"])
