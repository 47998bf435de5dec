"""Tables print texts unchanged, and cut nothing where a terminal is narrow."""

import io

import pytest

from megatron_hammer.files.tables import PLAIN_WIDTH, build_pairs, build_table, format_markdown_table, open_console


def render(*renderables: object) -> list[str]:
    stream = io.StringIO()
    open_console(stream).print(*renderables)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_texts_stand_left_and_numbers_right() -> None:
    table = build_table("sizes", ("name", "kind", "bytes"), [("a", "x", "7"), ("long name", "y", "1,234")], num_text=2)
    assert render(table) == [
        "sizes",
        " name        kind   bytes",
        "──────────────────────────",
        " a           x          7",
        " long name   y      1,234",
    ]


def test_pairs_have_no_header() -> None:
    assert render(build_pairs("run", {"steps": "7", "a": "b"})) == ["run", " steps   7", " a       b"]


def test_brackets_are_printed_as_text() -> None:
    lines = render(build_table("[bold]t", ("[red]c",), [("[green]x :smile:",)], num_text=1), "[dim]y")
    assert [lines[0], lines[1], lines[3], lines[4]] == ["[bold]t", " [red]c", " [green]x :smile:", "[dim]y"]


def test_a_file_gets_whole_rows() -> None:
    assert render(build_table(None, ("c",), [("x" * (PLAIN_WIDTH - 10),)]))[2].strip() == "x" * (PLAIN_WIDTH - 10)


def test_a_narrow_terminal_folds_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then takes the stream for a terminal
    monkeypatch.setenv("COLUMNS", "20")
    text = "".join(render(build_table(None, ("c", "n"), [("abcdefghijklmnopqrstuvwxyz", "12345")])))
    assert "…" not in text
    assert all(character in text for character in "abcdefghijklmnopqrstuvwxyz12345")


def test_a_bar_in_a_cell_of_markdown_stays_text() -> None:
    table = format_markdown_table(("name", "kind", "score"), [("a|b", "x", "1")], num_text=2)
    assert table.splitlines() == ["| name | kind | score |", "| --- | --- | ---: |", r"| a\|b | x | 1 |"]
