"""The command: sentences and a table, JSON, files, and changes that cannot be made."""

import json
from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.csv_table import read_csv
from tests.helpers.study_commands import run_study

SMALL = ("sensitivity", "--preset", "hammer-tiny", "--gpu", "a100-sxm-80gb", "--top", "3")


def test_chosen_changes_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("--vary", "network=x0.5", "kernels=-5%", "kernels=-5%")
    run_study(*SMALL, "--gpus", "2", *changes, "--output-dir", str(tmp_path))
    captured = capsys.readouterr()
    assert captured.out.startswith("GPU time per token changes most with: efficiency of matrix products")
    assert captured.out.splitlines()[-1] == (
        f"2 changes, 2 with a result; 3 layouts of the base; written to {tmp_path}"
    )
    assert captured.err.splitlines()[0] == "search: base"
    names, records = read_csv(tmp_path / "sensitivity.csv")
    assert names[:2] == ["quantity", "change"]
    assert [cells[:2] for _, cells in records] == [["network", "x0.5"], ["kernels", "-5%"]]
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    run_study(*SMALL, "--gpus", "2", *changes, "--json")
    assert capsys.readouterr().out == (tmp_path / "sensitivity.json").read_text(encoding="utf-8")


def test_the_usual_changes_need_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    run_study(*SMALL, "--gpus", "1", "--json")
    document = json.loads(capsys.readouterr().out)
    assert len(document["outcomes"]) > 20
    # Half a GPU is one of the usual changes that this study cannot make.
    (half,) = [one for one in document["outcomes"] if (one["quantity"], one["change"]) == ("gpus", "x0.5")]
    assert "must stay a whole number, got 0.5" in half["problem"]


def test_all_bad_changes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        run_study(*SMALL, "--gpus", "2", "--vary", "speed=x2", "network=x2", "query-groups=7")
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["vary", "query-groups"]
    with pytest.raises(ConfigError, match=r"gpus: must be one number of GPUs, got 2, 4"):
        run_study(*SMALL, "--gpus", "2,4")


@pytest.mark.parametrize("flag", ["--train-tokens", "--usd-per-gpu-hour"])
def test_flags_without_effect_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"unrecognized arguments: {flag} 1"):
        run_study(*SMALL, "--gpus", "2", flag, "1")
