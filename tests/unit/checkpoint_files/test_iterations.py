import os
from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE, read_tracker
from megatron_hammer.checkpoint_files.iterations import (
    begin_iteration,
    list_iterations,
    list_leftovers,
    publish_iteration,
    remove_iteration,
    remove_leftovers,
)
from megatron_hammer.checkpoint_files.torch_dist.content_hashes import HASHES_FILE, read_hashes, require_intact
from megatron_hammer.errors import CheckpointError


def make(folder: Path, name: str, content: str = "old") -> Path:
    (folder / name).mkdir()
    (folder / name / "shard").write_text(content)
    return folder / name


def test_an_iteration_appears_at_once_and_replaces_an_older_one(tmp_path: Path) -> None:
    directory = make(tmp_path, "iter_0000110")
    unfinished_dir = begin_iteration(directory, is_writer=True)
    (unfinished_dir / "shard").write_text("new")
    assert (directory / "shard").read_text() == "old"
    publish_iteration(unfinished_dir, directory, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["iter_0000110"]
    assert (directory / "shard").read_text() == "new"
    assert require_intact(directory)


def test_what_a_killed_save_left_is_not_mixed_with_the_next(tmp_path: Path) -> None:
    make(tmp_path, "unfinished_iter_0000110")
    (tmp_path / "iter_0000110").mkdir()  # megatron makes it
    unfinished_dir = begin_iteration(tmp_path / "iter_0000110", is_writer=True)
    assert list(unfinished_dir.iterdir()) == []
    assert not (tmp_path / "iter_0000110").exists()
    assert begin_iteration(tmp_path / "iter_0000110", is_writer=False) == unfinished_dir


def test_leftovers_are_known_by_their_names(tmp_path: Path) -> None:
    for name in ("unfinished_iter_0000003", "removed_iter_0000001", "unfinished_business", "iter_0000002", "iter_x"):
        make(tmp_path, name)
    assert [path.name for path in list_leftovers(tmp_path)] == ["removed_iter_0000001", "unfinished_iter_0000003"]
    assert remove_leftovers(tmp_path) == ["removed_iter_0000001", "unfinished_iter_0000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", "iter_x", "unfinished_business"]
    assert list_iterations(tmp_path) == {2: tmp_path / "iter_0000002"}
    assert list_iterations(tmp_path / "gone") == {}
    assert list_leftovers(tmp_path / "gone") == []


def test_a_removed_link_leaves_its_target(tmp_path: Path) -> None:
    target = make(tmp_path, "elsewhere")
    (tmp_path / "iter_0000001").symlink_to(target)
    remove_iteration(tmp_path / "iter_0000001")
    remove_iteration(tmp_path / "iter_0000009")  # not there
    assert (target / "shard").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_does_not_stand_in_the_way_of_a_save(tmp_path: Path, kind: str) -> None:
    other, unfinished = make(tmp_path, "other"), tmp_path / "unfinished_iter_0000110"
    unfinished.symlink_to(other) if kind == "link" else unfinished.touch()
    assert begin_iteration(tmp_path / "iter_0000110", is_writer=True).is_dir()
    assert (other / "shard").exists()


def test_pipes_are_refused(tmp_path: Path) -> None:
    directory = make(tmp_path, "iter_0000110")
    os.mkfifo(directory / HASHES_FILE)
    os.mkfifo(tmp_path / LATEST_FILE)
    with pytest.raises(CheckpointError, match=r"integrity\.json: must be a file, got a pipe"):
        read_hashes(directory)
    with pytest.raises(CheckpointError, match=f"{LATEST_FILE}: must be a file, got a pipe"):
        read_tracker(tmp_path)
