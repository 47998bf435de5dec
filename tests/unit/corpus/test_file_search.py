"""Folders and patterns give everything that is there, and name everything that cannot be reached."""

import errno
import glob
import os
from pathlib import Path

import pytest

from megatron_hammer.corpus.file_search import MAX_PROBLEMS_SHOWN, FileSearch, Found, identify_file, shorten
from tests.helpers.messages import assert_problem, assert_problems
from tests.helpers.privileges import folder_of_everyone, without_privileges

TREE = ("a.x", "b.y", "sub/a.x", "sub/deep/c.x", "sub/.hidden/d.x", ".e.x", "sub.x/f.x", "s[1]/g.x")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


def names_of(found: list[Found], folder: Path) -> list[str]:
    return [os.path.relpath(entry.path, folder) for entry in found]


def test_a_folder_gives_all_files_below_it_and_keeps_folders_together(tree: Path) -> None:
    search = FileSearch()
    assert names_of(search.list_files(tree), tree) == sorted(TREE, key=lambda name: Path(name).parts)
    assert search.problems == []


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.x",
        "*/*.x",
        "**/*.x",
        "**/deep/*",
        ".*",
        "sub/**/*.x",
        "s?b/a.x",
        "s[[]1]/*",
        "*/",
        "no/*",
        "**/.h*/*",
        "*/a.x",
    ],
)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_patterns_match_what_they_match_in_the_standard_library(
    tree: Path, pattern: str, is_absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    pattern = f"{tree}/{pattern}" if is_absolute else pattern
    search = FileSearch()
    expected = sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda path: path.parts)
    assert [found.path for found in search.expand(pattern)] == expected
    assert search.problems == []


def test_two_stars_at_the_end_match_every_file_that_is_not_hidden(tree: Path) -> None:
    visible = [name for name in TREE if "/." not in f"/{name}"]
    found = FileSearch().expand(f"{tree}/**")
    assert names_of(found, tree) == sorted(visible, key=lambda name: Path(name).parts)


def test_links_are_followed_and_a_folder_inside_itself_is_entered_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.x").write_text("z")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "sub" / "deep" / "up").symlink_to(tree)
    (tmp_path / "elsewhere" / "back").symlink_to(tree / "sub", target_is_directory=True)
    search = FileSearch()
    names = names_of(search.list_files(tree), tree)
    assert {name for name in names if not name.startswith("linked/back/")} == {*TREE, "linked/z.x"}
    # Another way to `sub`: it does not contain `linked`, so it is no circle, but its own link to the top is one.
    assert "linked/back/deep/c.x" in names
    assert not any("up" in name for name in names)
    assert names_of(search.expand(f"{tree}/**/z.x"), tree) == ["linked/z.x"]
    assert search.problems == []


def test_what_cannot_be_reached_is_named(tree: Path) -> None:
    (tree / "gone.x").symlink_to("/nowhere/en.x")
    (tree / "sub" / "round").symlink_to("round")
    search = FileSearch()
    assert len(search.list_files(tree)) == len(TREE)
    problems = [
        (f"{tree}/gone.x: link must lead to a file or a folder, got /nowhere/en.x",),
        (f"{tree}/sub/round: link must lead to", "got round"),
    ]
    assert_problems(sorted(search.problems), *problems)
    search = FileSearch()
    assert names_of(search.expand(f"{tree}/*/*.x"), tree) == ["s[1]/g.x", "sub/a.x", "sub.x/f.x"]
    assert_problems(search.problems, problems[0])  # it may have been a folder with matches
    long_name = "n" * 300
    search.problems.clear()
    assert search.expand(f"{tree}/*/{long_name}") == []
    assert all("File name too long" in problem for problem in search.problems[1:])
    assert len(search.problems) > 1


def test_a_folder_without_permission_is_named() -> None:
    with folder_of_everyone() as folder:
        (folder / "closed").mkdir()
        (folder / "closed" / "a.x").touch()
        (folder / "listed").mkdir()
        (folder / "listed" / "b.x").touch()
        os.chmod(folder / "closed", 0o000)
        os.chmod(folder / "listed", 0o444)
        with without_privileges():
            for found in (FileSearch.list_files, lambda search, path: search.expand(f"{path}/*/*")):
                search = FileSearch()
                assert found(search, folder) == []
                assert_problems(
                    sorted(search.problems),
                    (f"{folder}/closed: input must be readable", "got: Permission denied"),
                    (f"{folder}/listed/b.x: input must be readable", "got: Permission denied"),
                )


def test_left_out_entries_are_neither_listed_nor_entered(tree: Path) -> None:
    search = FileSearch(lambda path: path.name in ("sub", "a.x"))
    assert names_of(search.list_files(tree), tree) == [".e.x", "b.y", "s[1]/g.x", "sub.x/f.x"]
    assert names_of(search.expand(f"{tree}/*.x"), tree) == ["sub.x"]


def test_a_file_is_known_under_all_its_names(tree: Path) -> None:
    (tree / "soft.x").symlink_to("a.x")
    (tree / "hard.x").hardlink_to(tree / "a.x")
    names = ("a.x", "sub/../a.x", "soft.x", "hard.x")
    assert len({identify_file(tree / name) for name in names}) == 1
    assert identify_file(tree / "b.y") != identify_file(tree / "a.x")
    without_number = os.stat_result((0o100644, 0, 7, 1, 0, 0, 0, 0, 0, 0))
    assert identify_file(tree / "soft.x", without_number) == identify_file(tree / "a.x", without_number)
    assert identify_file(tree / "b.y", without_number) != identify_file(tree / "a.x", without_number)


def test_many_problems_are_cut_short() -> None:
    problems = [f"{n}: bad." for n in range(MAX_PROBLEMS_SHOWN + 7)]
    assert shorten(problems[:MAX_PROBLEMS_SHOWN]) == problems[:MAX_PROBLEMS_SHOWN]
    assert_problem(shorten(problems)[-1], "input: 7 more")
    assert len(shorten(problems)) == MAX_PROBLEMS_SHOWN + 1


def test_a_failing_disk_is_no_empty_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    search = FileSearch()
    assert search.list_files(tree) == []
    assert_problem(search.problems[0], f"{tree}: input must be readable", "got: Input/output error")
