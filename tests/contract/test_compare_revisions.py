"""benchmarks/compare_revisions.py: its commands are those of this repository, and it reports what differs."""

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from compare_revisions import ABOUT, compare
from revisions import commands as revision_commands
from revisions.material import MODELS
from revisions.results import describe_stream, format_json, list_facts

COMMANDS = [line for section in revision_commands.build_sections(None).values() for line in section.values()]


def test_commands_run_scripts_of_this_repository() -> None:
    scripts = {
        word for line in COMMANDS for word in re.findall(r"(?:^|\s)((?:tools|checkpoint_convert|examples)/\S+)", line)
    }
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    converters = {f"checkpoint_convert/{path.name}" for path in (ROOT / "checkpoint_convert").glob("*.py")}
    assert converters <= scripts


def test_every_preset_and_model_is_there() -> None:
    assert revision_commands.DRY_RUNS.keys() == PRESETS.keys()
    converted = {*revision_commands.DENSE_MODELS, *revision_commands.MOE_MODELS}
    assert converted - MODELS.keys() == {"gpt2-published", "llama-pickled"}  # made of others
    assert MODELS.keys() <= converted


def write_recording(folder: Path, *, loss: str = "7.25", sentence: str = "3 read") -> Path:
    for section, text in (
        ("tour", f"@@ metrics.jsonl\nloss {loss}\n@@ stderr\n"),
        ("wording", f"@@ stdout\n{sentence}\n"),
    ):
        (folder / section).mkdir(parents=True)
        (folder / section / "tour.txt").write_text(text)
    (folder / ABOUT).write_text(json.dumps({"revision": folder.name, "sections": {"tour": 1}}))
    return folder


def test_equal_recordings_are_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(write_recording(tmp_path / "old"), write_recording(tmp_path / "new"), [])
    assert "3 items, 3 identical, 0 different" in capsys.readouterr().out


def test_one_changed_value_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_recording(tmp_path / "old"), write_recording(tmp_path / "new", loss="7.26")
    assert not compare(old, new, ["wording"])
    output = capsys.readouterr().out
    assert "tour/tour: metrics.jsonl\n  -loss 7.25\n  +loss 7.26" in output
    assert "2 items, 1 identical, 1 different; left out: wording" in output


def test_another_wording_is_a_difference_unless_ignored(tmp_path: Path) -> None:
    old, new = write_recording(tmp_path / "old"), write_recording(tmp_path / "new", sentence="read: 3")
    assert not compare(old, new, [])
    assert compare(old, new, ["wording"])


def test_an_incomplete_recording_is_refused(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "old")
    (recording / ABOUT).unlink()
    with pytest.raises(SystemExit, match="must be a complete recording"):
        compare(recording, recording, [])


def test_facts_survive_a_rewording_and_nothing_else() -> None:
    before = "error: min-lr: must not be above lr, got min_lr=1.0, lr=0.5. Pass --min-lr 0.5."
    after = "error: min-lr: the least rate is above the rate (min_lr=1.0, lr=0.5). Use --min-lr 0.5."
    assert list_facts(before) == list_facts(after)
    assert list_facts(before) != list_facts(after.replace("1.0", "1.5"))
    assert list_facts(before) != list_facts(after.replace("--min-lr", "--lr"))


def test_times_are_left_out_and_results_are_not() -> None:
    assert describe_stream("stdout", "4 in, 4 out; 1.2 s\n", "messages") == describe_stream(
        "stdout", "4 in, 4 out; 0.9 s\n", "messages"
    )
    assert format_json({"elapsed_s": 1.0, "step_time_s": 2.0}) == format_json({"elapsed_s": 3.0, "step_time_s": 2.0})
    assert format_json({"step_time_s": 2.0}) != format_json({"step_time_s": 2.1})
