"""A folder gets its name only when it is complete; whatever goes wrong leaves nothing."""

import errno
import os

import pytest

from megatron_hammer.errors import ConversionError
from megatron_hammer.files.atomic_folder import publish_directory


def write_into(save_dir):
    with publish_directory(save_dir) as folder:
        assert folder.name == "hf.partial"
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("1")
    assert [path.name for path in save_dir.iterdir()] == ["a"]
    assert [path.name for path in save_dir.parent.iterdir()] == ["hf"]


def test_it_gets_its_name_at_the_end(tmp_path):
    write_into(tmp_path / "new" / "hf")


def test_an_empty_target_and_what_a_killed_run_left_are_replaced(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "old").write_text("")
    write_into(tmp_path / "hf")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "broken")])
def test_an_interruption_leaves_nothing(tmp_path, error):
    def interrupt(folder):
        (folder / "a").write_text("1")
        raise error

    with pytest.raises(type(error)), publish_directory(tmp_path / "hf") as folder:
        interrupt(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(ConversionError, match=r"hf.partial: directory cannot be written \(No space left on device\)"),
        publish_directory(tmp_path / "hf"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_or_holds_something_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (("file", "got a file"), (".", "got 1 entries"), ("file/hf", "directory cannot be made")):
        with pytest.raises(ConversionError, match=message), publish_directory(tmp_path / path):
            pass
