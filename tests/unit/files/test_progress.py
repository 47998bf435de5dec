"""The progress line is written to a terminal only."""

import pytest
from rich.progress import TextColumn

from megatron_hammer.files.progress import build_byte_progress, show_stages


def show_two_stages() -> None:
    with show_stages("{} tensors") as show:
        show("writing", 1, None)
        show("writing", 3, 3)
        show("verifying", 2, 7)


def test_nothing_is_written_where_stderr_is_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    show_two_stages()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_line_a_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then takes the stream for a terminal
    show_two_stages()
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    for words in ("writing tensors", "3/3", "verifying tensors", "2/7"):
        assert words in stderr
    assert stderr.endswith("\x1b[2K")  # the lines are taken away at the end


def test_columns_stand_between_the_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = TextColumn("{task.fields[counts]}")
    plain, described = build_byte_progress(counts), build_byte_progress(counts, has_description=True)
    names = [type(column).__name__ for column in plain.columns]
    assert names == ["BarColumn", "DownloadColumn", "TransferSpeedColumn", "TextColumn", "TimeRemainingColumn"]
    assert [type(column).__name__ for column in described.columns] == ["TextColumn", *names]
    assert plain.columns[3] is described.columns[4] is counts
