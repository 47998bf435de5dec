"""A file is read whole, or the message names it with the reason."""

import os
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError, DataError, HammerError
from megatron_hammer.files.read import is_present, read_bytes, read_text


def test_bytes_and_texts_come_back(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes("größe\r\n".encode())
    assert read_bytes(tmp_path / "f") == "größe\r\n".encode()
    assert read_text(tmp_path / "f") == "größe\n"
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")  # only what is in front marks the byte order
    assert read_text(tmp_path / "f") == "a\ufeff"


@pytest.mark.parametrize("kind", [DataError, ConfigError])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: type[HammerError]) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(kind, match=r"latin: text must be UTF-8, got byte 0xe9 at offset 3. Convert"):
        read_text(tmp_path / "latin", raises=kind)
    os.mkfifo(tmp_path / "pipe")  # nobody writes it, so that reading would not end
    for read in (read_bytes, read_text):
        with pytest.raises(kind, match=r"pipe: must be a file, got a pipe"):
            read(tmp_path / "pipe", raises=kind)
        with pytest.raises(kind, match=r"none: file cannot be read \(No such file or directory\). Check the path"):
            read(tmp_path / "none", raises=kind)


def test_an_optional_file_is_absent_only_where_nothing_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "link").symlink_to("f")
    assert is_present(tmp_path / "f")
    assert is_present(tmp_path / "link")
    assert not is_present(tmp_path / "none")
    assert not is_present(tmp_path / "f" / "below")
    (tmp_path / "lost").symlink_to("gone")
    (tmp_path / "self").symlink_to("self")
    for name, target in (("lost", "gone"), ("self", "self")):
        with pytest.raises(ConfigError, match=rf"{name}: link must lead to a file, got {target}. Repair or remove"):
            is_present(tmp_path / name, raises=ConfigError)
    with pytest.raises(DataError, match="must be a file, got a folder"):
        is_present(tmp_path)
    with pytest.raises(DataError, match="file cannot be read"):
        is_present(tmp_path / ("x" * 300))
