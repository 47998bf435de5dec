"""A file or folder gets its final name only when it is complete; any error leaves nothing."""

import errno
import os
import re
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_hammer.errors import OutputError
from megatron_hammer.files.publish import publish_directory, publish_file, publish_files, publish_path

ERRORS = [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "broken")]
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_gets_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with publish_file(path) as file:
        file.write(b"1")
        assert names_in(path.parent) == ["x.json.partial"]
    assert path.read_bytes() == b"1"
    assert names_in(path.parent) == ["x.json"]


def test_an_older_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old and longer")
    with publish_path(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old and longer"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupted_file_leaves_the_older_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def interrupt(file: BinaryIO) -> None:
        file.write(b"new")
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), publish_file(path) as file:
        interrupt(file)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["x.json"]


@needs_dev_full
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.partial").symlink_to("/dev/full")
    message = re.escape(f"{tmp_path}/x: file cannot be written (No space left on device). Free space")
    with pytest.raises(OutputError, match=message), publish_file(tmp_path / "x") as file:
        file.write(b"1")
    assert names_in(tmp_path) == []


def test_a_read_error_while_writing_names_the_file_that_was_read(tmp_path: Path) -> None:
    message = rf"x: file cannot be written \(No such file or directory: {tmp_path}/source\)"
    with pytest.raises(OutputError, match=message), publish_file(tmp_path / "x"):
        (tmp_path / "source").read_bytes()


def test_a_writer_that_makes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x: file cannot be written \(No such file"), publish_path(tmp_path / "x"):
        pass


def test_several_files_are_written_in_new_folders(tmp_path: Path) -> None:
    publish_files({tmp_path / "a" / "b" / "table.csv": "größe\n1\n", tmp_path / "plot.png": b"\x89PNG"})
    assert names_in(tmp_path) == ["a", "a/b", "a/b/table.csv", "plot.png"]
    assert (tmp_path / "a/b/table.csv").read_bytes() == "größe\n1\n".encode()
    assert (tmp_path / "plot.png").read_bytes() == b"\x89PNG"


def test_one_file_that_cannot_be_written_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "file").write_text("in the way")
    contents: dict[Path, str | bytes] = {tmp_path / "old.txt": "new", tmp_path / "file" / "below.txt": "x"}
    message = re.escape(f"{tmp_path}/file/below.txt: file cannot be written (")
    with pytest.raises(OutputError, match=message + r".+\)\. Free space, or choose another place\.$"):
        publish_files(contents)
    assert (tmp_path / "old.txt").read_text() == "old"
    assert names_in(tmp_path) == ["file", "old.txt"]


def test_a_folder_in_the_place_of_a_file_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"out: file cannot be written \(Is a directory\)\. .+ another place\.$"):
        publish_files({tmp_path / "first": "x", tmp_path / "out": "y"})
    assert names_in(tmp_path) == ["out"]


def write_into(save_dir: Path) -> None:
    with publish_directory(save_dir) as folder:
        assert folder.name == "hf.partial"
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("1")
    assert names_in(save_dir.parent) == ["hf", "hf/a"]


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    write_into(tmp_path / "new" / "hf")


def test_an_empty_target_and_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "old").write_text("")
    write_into(tmp_path / "hf")


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupt(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise error

    with pytest.raises(type(error)), publish_directory(tmp_path / "hf") as folder:
        interrupt(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"hf.partial: directory cannot be written \(No space left on device\)"),
        publish_directory(tmp_path / "hf"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_or_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (("file", "got a file"), (".", "got 1 entries"), ("file/hf", "directory cannot be made")):
        with pytest.raises(OutputError, match=message), publish_directory(tmp_path / path):
            pass
