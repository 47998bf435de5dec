import time
from pathlib import Path

import pytest

from megatron_hammer.training.supervision.progress import ProgressRecord, find_record, open_record, read_record


def test_a_record_is_read_by_another_process_as_it_was_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HAMMER_PROGRESS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "5")
    record = open_record()
    path = find_record(tmp_path, 5)
    first = read_record(path)
    assert first is not None
    assert (first.step, first.phase, first.is_waiting) == (0, "starting", False)
    assert record.enter("saving") == "starting"
    record.finish_step(7)
    record.begin_wait()
    waiting = read_record(path)
    assert waiting is not None
    assert (waiting.step, waiting.phase, waiting.is_waiting, waiting.num_waits) == (7, "saving", True, 1)
    assert 0 <= time.monotonic() - waiting.changed_at_s < 60
    record.end_wait()
    ended = read_record(path)
    assert ended is not None
    assert not ended.is_waiting


def test_without_a_launcher_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAMMER_PROGRESS_DIR", raising=False)
    open_record().finish_step(3)
    assert read_record(find_record(tmp_path, 0)) is None


def test_a_record_that_is_not_complete_is_none(tmp_path: Path) -> None:
    find_record(tmp_path, 0).write_bytes(b"\0" * 32)
    assert read_record(find_record(tmp_path, 0)) is None


def test_a_link_in_the_place_of_a_record_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="link"):
        ProgressRecord(tmp_path / "link")
    assert not (tmp_path / "victim").exists()
