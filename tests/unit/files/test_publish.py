"""A file or folder gets its final name only when it is complete; any error leaves nothing."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_hammer.errors import OutputError
from megatron_hammer.files import publish
from megatron_hammer.files.publish import (
    begins_with,
    publish_directory,
    publish_file,
    publish_files,
    publish_path,
    publish_results,
    require_places,
    require_result_folder,
    require_results,
)

ERRORS = [KeyboardInterrupt(), ValueError(), OSError(errno.EIO, "broken")]
PARTIAL = re.compile(r"(.+)\.[0-9a-f]{16}\.partial")


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_gets_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with publish_file(path) as file:
        file.write(b"1")
        assert PARTIAL.fullmatch(*names_in(path.parent))[1] == "x.json"
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


def fill_the_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    message = re.escape(f"{tmp_path}/x: file cannot be written (No space left on device). Free space")
    with pytest.raises(OutputError, match=message), publish_file(tmp_path / "x") as file:
        file.write(b"1")
    assert names_in(tmp_path) == []


def test_a_read_error_while_writing_names_the_file_that_was_read(tmp_path: Path) -> None:
    message = rf"x: file cannot be written \(No such file or directory: {tmp_path}/source\)"
    with pytest.raises(OutputError, match=message), publish_file(tmp_path / "x"):
        (tmp_path / "source").read_bytes()


def test_a_writer_that_makes_no_file_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"x: file cannot be written \(nothing was written"),
        publish_path(tmp_path / "x"),
    ):
        pass
    assert names_in(tmp_path) == []


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
        assert PARTIAL.fullmatch(folder.name)[1] == "hf"
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("1")
    assert names_in(save_dir.parent) == ["hf", "hf/a"]


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    write_into(tmp_path / "new" / "hf")


def test_an_empty_target_and_leftovers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    left = tmp_path / "hf.0123456789abcdef.partial"
    left.mkdir()
    (left / "old").write_text("")
    write_into(tmp_path / "hf")


def test_a_users_own_partial_is_left_alone(tmp_path: Path) -> None:
    """Only names that nobody else can have are ours."""
    own = [tmp_path / name for name in ("hf.partial", "hf.0123.partial", "other.0123456789abcdef.partial")]
    for folder in own:
        folder.mkdir()
        (folder / "mine").write_text("1")
    (tmp_path / "x.partial").write_text("mine")
    with publish_directory(tmp_path / "hf") as folder:
        (folder / "a").write_text("1")
    publish_files({tmp_path / "x": "new"})
    assert [(folder / "mine").read_text() for folder in own] == ["1"] * 3
    assert (tmp_path / "x.partial").read_text() == "mine"


def test_files_of_a_folder_can_be_read_as_the_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.touch(mode=0o600)
    old_mask = os.umask(0o027)
    try:
        with publish_directory(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "private").touch(mode=0o600)
            (folder / "hard").hardlink_to(shared)
    finally:
        os.umask(old_mask)
    modes = [(tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("sub/private", "hard")]
    assert modes == [0o640, 0o600]


def test_of_two_writers_of_one_folder_the_first_wins(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "hf") as first:
        (first / "a").write_text("first")
        message = r"hf: must not be written by two processes at a time, got another one that writes hf\.\w+\.partial"
        with pytest.raises(OutputError, match=message), publish_directory(tmp_path / "hf", overwrite=True):
            pass
        with publish_directory(tmp_path / "other"):
            pass
        assert (first / "a").read_text() == "first"
    assert names_in(tmp_path) == ["hf", "hf/a", "other"]


def write_slowly(slow: Path, target: Path) -> None:
    """Write into the partial folder, while another writer of the same target begins and ends."""
    (slow / "a").write_text("slow")
    with publish_directory(target) as quick:
        (quick / "a").write_text("quick")
    assert (slow / "a").read_text() == "slow"


def test_without_locks_the_quicker_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none: then nothing of another writer is removed either."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(publish.fcntl, "flock", refuse)
    message = "hf: target must be absent or an empty folder, got 1 entries"
    with pytest.raises(OutputError, match=message), publish_directory(tmp_path / "hf") as slow:
        write_slowly(slow, tmp_path / "hf")
    assert (tmp_path / "hf" / "a").read_text() == "quick"
    assert names_in(tmp_path) == ["hf", "hf/a"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with publish_file(tmp_path / "x") as first:
        first.write(b"first")
        publish_files({tmp_path / "x": "second"})
        first.write(b" again")
    assert (tmp_path / "x").read_bytes() == b"first again"


def test_the_replaced_folder_is_whole_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("1")
    found: list[list[str]] = []
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: (found.append(names_in(tmp_path)), rmtree(*args)))
    with publish_directory(tmp_path / "hf", overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert {"hf", "hf/new"} <= set(found[0])
    assert any(name.endswith(".replaced/old") for name in found[0])
    assert names_in(tmp_path) == ["hf", "hf/new"]


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupt(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise error

    with pytest.raises(type(error)), publish_directory(tmp_path / "hf") as folder:
        interrupt(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence(tmp_path: Path, number: int) -> None:
    reason = os.strerror(number)
    with (
        pytest.raises(OutputError, match=rf"hf\.\w+\.partial: directory cannot be written \({reason}\)"),
        publish_directory(tmp_path / "hf"),
    ):
        raise OSError(number, reason)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_or_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (("file", "got a file"), (".", "got 1 entries"), ("file/hf", "directory cannot be made")):
        with pytest.raises(OutputError, match=message), publish_directory(tmp_path / path):
            pass


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run" / "iter_1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    source = tmp_path / "run" / "iter_1"
    for target in (source, tmp_path / "run", tmp_path / "link", tmp_path / "run" / ".." / "run" / "iter_1", tmp_path):
        with (
            pytest.raises(OutputError, match="target must not be or hold the input"),
            publish_directory(target, overwrite=True, sources=[tmp_path / "other", source]),
        ):
            pass
    # Beside or inside of an input, an output removes nothing of it.
    for target in (tmp_path / "run" / "iter", source / "export"):
        with publish_directory(target, overwrite=True, sources=[source]):
            pass
    assert names_in(tmp_path) == ["link", "run", "run/iter", "run/iter_1", "run/iter_1/export"]


def test_results_replace_those_of_an_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    files: dict[Path, str | bytes] = {
        tmp_path / "a.json": '{"format": "megatron_hammer.scaling.x"}',
        tmp_path / "a.png": b"image",
    }
    (tmp_path / "a.json").touch()  # an empty file holds nothing
    publish_results(files)
    publish_results({**files, tmp_path / "a.png": b"new"})
    assert (tmp_path / "a.png").read_bytes() == b"new"
    (tmp_path / "a.json").write_text("notes")
    with pytest.raises(OutputError, match=r"a\.json: file must be an earlier result of this command"):
        publish_results(files)
    assert (tmp_path / "a.json").read_text() == "notes"
    assert (tmp_path / "a.png").read_bytes() == b"new"


def test_results_of_another_command_stay(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    output.write_text('{"format": "megatron_hammer.scaling.projection"}')
    with pytest.raises(OutputError, match=r"step\.json: file must be an earlier result of this command"):
        publish_results({output: "new"}, mark="megatron_hammer.scaling.trace")
    assert "projection" in output.read_text()
    output.write_text('{"format": "megatron_hammer.scaling.trace"}')
    publish_results({output: "new"}, mark="megatron_hammer.scaling.trace")
    assert output.read_text() == "new"


def test_an_output_takes_the_place_of_its_own_kind_only(tmp_path: Path) -> None:
    plot, table = tmp_path / "a.png", tmp_path / "a.csv"
    places = ((plot, begins_with(b"\x89PNG")), (table, begins_with(b"name,")), (None, begins_with(b"")))
    require_places(*places)
    plot.write_bytes(b"\x89PNG...")
    table.touch()  # an empty file holds nothing
    require_places(*places)
    table.write_text("name")
    with pytest.raises(OutputError, match=r"a\.csv: file must be an earlier result of this command"):
        require_places(*places)


def test_two_outputs_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"link/a: two outputs must have two names, got \S+/a for both"):
        require_places((tmp_path / "a", begins_with(b"")), (tmp_path / "link" / "a", begins_with(b"")))


def test_a_place_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "result.json").mkdir()
    for path, reason in (
        (tmp_path / "file" / "new" / "a.json", "is not a folder"),
        (tmp_path / "result.json", "folder"),
    ):
        with pytest.raises(OutputError, match=f"{path}: file cannot be written .*{reason}"):
            require_results([path])
    require_results([tmp_path / "new" / "folder" / "a.json"])
    assert not (tmp_path / "new").exists()


def test_a_folder_is_a_result_by_its_mark_and_by_what_else_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "hf"

    def check() -> None:
        require_result_folder(folder, "card.md", mark="by us", holds_only=r"card\.md|model.*")

    check()
    folder.mkdir()
    check()
    (folder / "model.bin").touch()
    with pytest.raises(OutputError, match=r"hf: --overwrite replaces an earlier result only, got no card\.md of this"):
        check()
    (folder / "card.md").write_text("made by others")
    with pytest.raises(OutputError, match=r"got no card\.md of this tool"):
        check()
    (folder / "card.md").write_text("made by us")
    check()
    (folder / "notes").mkdir()
    with pytest.raises(OutputError, match="got notes in it too"):
        check()
