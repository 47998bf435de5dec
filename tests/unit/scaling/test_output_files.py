"""Result files: whole, all or none, and no half-written one under a final name."""

import re
from pathlib import Path

import pytest

from megatron_hammer.errors import PlatformError
from megatron_hammer.scaling.output_files import (
    publish_files,
    write_bytes_atomically,
    write_text_atomically,
)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_are_written_in_new_folders(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a" / "b" / "table.csv", "größe\n1\n")
    write_bytes_atomically(tmp_path / "plot.png", b"\x89PNG")
    assert names_in(tmp_path) == ["a", "a/b", "a/b/table.csv", "plot.png"]
    assert (tmp_path / "a/b/table.csv").read_bytes() == "größe\n1\n".encode()
    assert (tmp_path / "plot.png").read_bytes() == b"\x89PNG"


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old and longer")
    write_text_atomically(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "new"


def test_one_file_that_cannot_be_written_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "file").write_text("in the way")
    contents: dict[Path, str | bytes] = {tmp_path / "old.txt": "new", tmp_path / "file" / "below.txt": "x"}
    message = re.escape(f"{tmp_path}/file/below.txt: file cannot be written (")
    with pytest.raises(PlatformError, match=message + r".+\)\. Free space, or choose another place\.$"):
        publish_files(contents)
    assert (tmp_path / "old.txt").read_text() == "old"
    assert names_in(tmp_path) == ["file", "old.txt"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    message = re.escape(f"{tmp_path}/out: must be a file's name, got a folder. Choose another place.")
    with pytest.raises(PlatformError, match=f"^{message}$"):
        publish_files({tmp_path / "first": "x", tmp_path / "out": "y"})
    assert names_in(tmp_path) == ["out"]
