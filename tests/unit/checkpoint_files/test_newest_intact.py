from pathlib import Path

import pytest

from megatron_hammer.checkpoint_files.checkpoint_reader import LATEST_FILE
from megatron_hammer.checkpoint_files.newest_intact import choose_iteration, has_checkpoint, read_tracker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Iterations 10, 20 and 30 with the file that says whether they are intact, and the tracker at 30."""
    for number in (10, 20, 30):
        directory = tmp_path / f"iter_{number:07d}"
        directory.mkdir()
        (directory / "metadata.json").touch()
    (tmp_path / LATEST_FILE).write_text("30\n")
    return tmp_path


def find_mark(directory: Path) -> list[str]:
    return [f"{directory}/shard: must be whole."] if (directory / "damaged").exists() else []


def choose(folder: Path, **options):
    return choose_iteration(folder, find_damage=find_mark, **options)


def test_the_tracked_iteration_is_taken_without_a_word(folder: Path) -> None:
    choice = choose(folder)
    assert (choice.directory, choice.iteration, choice.notes, choice.problems) == (folder / "iter_0000030", 30, (), ())


def test_a_damaged_iteration_is_passed_over_with_the_reason(folder: Path) -> None:
    (folder / "iter_0000030" / "damaged").touch()
    choice = choose(folder)
    assert choice.iteration == 20
    assert choice.notes[0] == f"iter_0000030 is passed over: {folder}/iter_0000030/shard: must be whole."
    assert "continuing from iter_0000020, the newest intact iteration" in choice.notes[1]
    choice = choose(folder, rejected={folder / "iter_0000020": "a flipped bit"})
    assert choice.iteration == 10
    assert "iter_0000020 is passed over: a flipped bit" in choice.notes


def test_iterations_after_the_tracked_one_are_no_part_of_the_run(folder: Path) -> None:
    (folder / LATEST_FILE).write_text("20")
    assert choose(folder).iteration == 20
    (folder / "iter_0000020" / "damaged").touch()
    assert choose(folder).iteration == 10


@pytest.mark.parametrize(
    ("tracker", "note"),
    [
        (None, "must exist beside 3 iterations"),
        ("", "got ''"),
        ("3x", "got '3x'"),
        ("-1", "got '-1'"),
        ("9" * 30, "got"),
    ],
)
def test_without_a_good_tracker_the_newest_is_taken(folder: Path, tracker: str | None, note: str) -> None:
    (folder / LATEST_FILE).unlink()
    if tracker is not None:
        (folder / LATEST_FILE).write_text(tracker)
    choice = choose(folder)
    assert choice.iteration == 30
    assert note in choice.notes[0]
    (problem,) = choose(folder, has_fall_back=False).problems
    assert note in problem


def test_a_missing_iteration_is_named(folder: Path) -> None:
    (folder / LATEST_FILE).write_text("40")
    choice = choose(folder)
    assert choice.iteration == 30
    assert f"checkpoint iter_0000040 named by {LATEST_FILE} is missing" in choice.notes[0]


def test_what_the_user_names_is_loaded_or_refused(folder: Path) -> None:
    (folder / "iter_0000030" / "damaged").touch()
    assert choose(folder, step=10).iteration == 10
    for options in ({"step": 30}, {"has_fall_back": False}):
        choice = choose(folder, **options)
        assert choice.directory is None
        assert choice.problems == (f"{folder}/iter_0000030/shard: must be whole.",)
    (folder / LATEST_FILE).write_text("release")
    assert "checkpoint release named by" in choose(folder).problems[0]
    (folder / "release").mkdir()
    assert (choose(folder).directory, choose(folder).iteration) == (folder / "release", None)
    assert choose(folder, step=20).iteration == 20


def test_nothing_intact_is_refused_and_never_started_afresh(folder: Path) -> None:
    for directory in folder.glob("iter_*"):
        (directory / "damaged").touch()
    for tracker in ("30", "", None):
        (folder / LATEST_FILE).unlink()
        if tracker is not None:
            (folder / LATEST_FILE).write_text(tracker)
        choice = choose(folder)
        assert choice.directory is None
        assert "must hold an intact iteration, got none of 3" in choice.problems[-1]
        assert sum("is passed over" in problem for problem in choice.problems) == 3


def test_only_saves_that_never_ended_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "iter_0000010" / "__0_0.distcp").touch()
    assert not has_checkpoint(tmp_path)
    choice = choose_iteration(tmp_path)
    assert (choice.directory, choice.problems) == (None, ())
    assert any("iter_0000010 is passed over" in note for note in choice.notes)
    assert read_tracker(tmp_path) is None
    assert not has_checkpoint("x" * 5000)
