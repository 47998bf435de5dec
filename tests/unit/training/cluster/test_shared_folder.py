"""Readers of a file that is replaced: by a rename they see whole versions, by a copy they do not."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_hammer.training.cluster import shared_folder
from megatron_hammer.training.cluster.shared_folder import time_file, wait_for_text, watch_versions, write_versions


def watch_while_written(path: Path, rename: Callable[[Path, Path], object]) -> tuple[list[str], float | None]:
    shared_folder.write_version(path, 0)
    writer = threading.Thread(target=write_versions, args=(path, rename), daemon=True)
    writer.start()
    found = watch_versions(path, 20.0)
    writer.join(20)
    return found


def test_a_rename_shows_whole_versions_only(tmp_path: Path) -> None:
    problems, seen_at_s = watch_while_written(tmp_path / "version", lambda source, target: source.replace(target))
    assert problems == []
    assert seen_at_s is not None


def copy_slowly(source: Path, target: Path) -> None:
    content = source.read_bytes()
    with open(target, "wb") as file:
        for start in range(0, len(content), 4096):
            file.write(content[start : start + 4096])
            file.flush()
            threading.Event().wait(0.0005)


def remove_first(source: Path, target: Path) -> None:
    target.unlink()
    threading.Event().wait(0.01)
    shutil.move(source, target)


@pytest.mark.parametrize(
    "rename, phrase", [(copy_slowly, "a part of the file"), (remove_first, "could not be read")], ids=["copy", "remove"]
)
def test_a_rename_that_is_none_is_noticed(rename: Callable[[Path, Path], object], phrase: str, tmp_path: Path) -> None:
    problems, _ = watch_while_written(tmp_path / "version", rename)
    assert any(phrase in problem for problem in problems), problems


def test_an_old_version_after_a_new_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client of a network file system does that has cached the old file."""
    versions = iter([1, 3, 2, shared_folder.NUM_VERSIONS])
    monkeypatch.setattr(Path, "read_bytes", lambda self: shared_folder._content(next(versions)))
    problems, seen_at_s = watch_versions(tmp_path / "version", 20.0)
    assert problems == ["an older version of the file was read after a newer one"]
    assert seen_at_s is not None


def test_a_folder_that_others_do_not_see_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("mine")
    assert wait_for_text(tmp_path / "token", "mine", 5.0) is not None
    assert wait_for_text(tmp_path / "token", "theirs", 0.05) is None
    assert wait_for_text(tmp_path / "gone" / "token", "mine", 0.05) is None


def test_a_file_is_timed_and_removed(tmp_path: Path) -> None:
    write, read, is_same = time_file(tmp_path / "0.bin", shared_folder.BLOCK_BYTES, seed=1)
    assert min(write, read) > 0
    assert is_same
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(descriptor: int, *rest: int) -> None:
        with open(tmp_path / "0.bin", "r+b") as file:
            file.seek(12345)
            byte = file.read(1)[0]
            file.seek(12345)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr("os.posix_fadvise", damage)
    assert time_file(tmp_path / "0.bin", shared_folder.BLOCK_BYTES, seed=1)[2] is False
