import datetime
import json
from pathlib import Path

import pytest

from megatron_hammer.training.supervision.launcher.events import EventLog


def test_an_event_is_a_line_with_time_host_and_sentence(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    for log in (EventLog(path), EventLog(path)):  # of two launchers
        log.write("rank-failed", "rank 3 was killed", rank=3)
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["event"] == second["event"] == "rank-failed"
    assert (first["rank"], first["message"]) == (3, "rank 3 was killed")
    assert first["host"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(first["time"])
    assert abs(age.total_seconds()) < 60


def test_a_place_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    log = EventLog(tmp_path / "file" / "events.jsonl")
    log.write("restart", "again")
    log.write("restart", "again")
    assert capsys.readouterr().err.count("events are not written") == 1
