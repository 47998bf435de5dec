"""A file is an input once, however it is named; nothing is left out without a word, and no output is an input."""

import os
from pathlib import Path

import pytest

from megatron_hammer.corpus.input_files import InputFiles, find_input_files, match_outputs, match_partials, show_path
from megatron_hammer.errors import DataError
from tests.helpers.messages import assert_problem, assert_problems
from tests.helpers.privileges import folder_of_everyone, without_privileges


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')


def problems_of(*inputs: Path | str) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        find_input_files(inputs)
    return tuple(caught.value.problems)


@pytest.mark.parametrize("second", ["a.jsonl", "sub/../a.jsonl", "./a.jsonl", "{absolute}", "soft.jsonl", "hard.jsonl"])
def test_a_file_with_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    write(tmp_path, "a.jsonl", "sub/b.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    second = second.format(absolute=tmp_path / "a.jsonl")
    (problem,) = problems_of("a.jsonl", second)
    assert_problem(problem, f"{Path(second)}: file must be named once", "a.jsonl and")


def test_a_link_beside_its_file_is_refused_in_a_folder_too(tmp_path: Path) -> None:
    write(tmp_path, "2024/a.jsonl")
    (tmp_path / "latest").symlink_to("2024")
    for item in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*.jsonl"):
        (problem,) = problems_of(item)
        assert_problem(
            problem,
            f"{tmp_path}/latest/a.jsonl: file must be named once",
            f"as {tmp_path}/2024/a.jsonl and {tmp_path}/latest/a.jsonl",
        )


def test_one_pattern_may_match_a_folder_and_its_files(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl", "in/sub/b.jsonl")
    for pattern in ("in/**", "**/*", "*"):
        assert [path.name for path in find_input_files([f"{tmp_path}/{pattern}"]).files] == ["a.jsonl", "b.jsonl"]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl", "out/b.jsonl", "out/c.jsonl")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "more" / "again").symlink_to(tmp_path / "in")
    names = [str(path.relative_to(tmp_path)) for path in find_input_files([tmp_path / "in"]).files]
    assert names == ["in/a.jsonl", "in/more/b.jsonl", "in/more/c.jsonl"]


def test_everything_unreadable_stops_the_run_by_name() -> None:
    with folder_of_everyone() as folder:
        write(folder, "good.jsonl", "closed/a.jsonl", "secret.jsonl")
        (folder / "gone").symlink_to("/nowhere")
        os.mkfifo(folder / "pipe.jsonl")
        os.mkfifo(folder / "pipe")
        os.chmod(folder / "closed", 0)
        os.chmod(folder / "secret.jsonl", 0)
        with without_privileges():
            assert_problems(
                sorted(problems_of(folder)),
                (f"{folder}/closed: input must be readable", "Permission denied"),
                (f"{folder}/gone: link must lead to", "got /nowhere"),
                (f"{folder}/pipe.jsonl: input must be a regular file",),
                (f"{folder}/secret.jsonl: input must be readable", "Permission denied"),
            )
            for item in ("closed", "closed/a.jsonl", "closed/*.jsonl", "*/*.jsonl", "secret.jsonl", "gone"):
                problem = problems_of(folder / item)[0]
                assert problem.startswith(f"{folder}/")
                assert "Permission" in problem or "/nowhere" in problem


def test_names_that_no_manifest_can_hold_are_refused_as_inputs_and_shown_where_ignored(tmp_path: Path) -> None:
    raw = os.fsdecode(b"caf\xe9")
    write(tmp_path, f"{raw}.jsonl")
    (problem,) = problems_of(tmp_path)
    assert_problem(problem, f"{tmp_path}/caf\\xe9.jsonl: name must be UTF-8")
    (tmp_path / f"{raw}.jsonl").rename(tmp_path / f"{raw}.md")
    write(tmp_path, "a.jsonl")
    assert [show_path(path) for path in find_input_files([tmp_path]).ignored] == [f"{tmp_path}/caf\\xe9.md"]


@pytest.mark.parametrize("item", ["n" * 300 + ".jsonl", "n" * 300 + "/*.jsonl", "d/" * 3000 + "a.jsonl"])
def test_overlong_names_are_one_sentence(tmp_path: Path, item: str) -> None:
    (problem,) = problems_of(tmp_path / item)
    assert_problem(problem, f"{tmp_path}/", "input must be readable, got: File name too long")


def test_descriptions_of_pairs_are_no_corpus(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "x_text_document.manifest.json", "y.journal.json", "z.manifest.json", "z.journal.json")
    for name in ("x_text_document.idx", "y_text_document.bin.partial"):
        (tmp_path / name).touch()
    found = find_input_files([tmp_path])
    # z: no pair of that name, so these may be anything
    assert [path.name for path in found.files] == ["a.jsonl", "z.journal.json", "z.manifest.json"]
    assert len(found.ignored) == 4


def test_own_outputs_are_neither_inputs_nor_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "in/a.jsonl", "in/own.json", "in/notes.md", "other/own.json")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    is_own = match_outputs(Path("link"), r"own\..*")

    def names_of(found: InputFiles) -> tuple[list[str], list[str]]:
        return [str(path) for path in found.files], [path.name for path in found.ignored]

    assert names_of(find_input_files(["in"], is_own)) == (["in/a.jsonl"], ["notes.md"])
    assert names_of(find_input_files(["link", "other"], is_own))[0] == ["link/a.jsonl", "other/own.json"]
    # as a shell expands in/*.json*
    assert names_of(find_input_files(["in/a.jsonl", "in/own.json"], is_own)) == (["in/a.jsonl"], [])
    assert names_of(find_input_files(["in/*.json*"], is_own)) == (["in/a.jsonl"], [])
    with pytest.raises(DataError, match=r"in/own\.json: inputs must be other files than this run's own outputs"):
        find_input_files(["in/own.json"], is_own)


def test_partial_files_of_an_output_are_its_own_and_the_output_is_not(tmp_path: Path) -> None:
    is_own = match_partials(tmp_path / "o.jsonl", None)
    assert is_own(tmp_path / "o.jsonl.partial")
    assert not is_own(tmp_path / "o.jsonl")
    assert not is_own(tmp_path / "sub" / "o.jsonl.partial")
