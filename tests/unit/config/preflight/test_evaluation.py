from pathlib import Path

import pytest

from tests.helpers.parsed_flags import TINY, find


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.toml").write_text('tasks = ["piqa"]\n')
    return tmp_path / "suite.toml"


def test_a_run_that_can_be_evaluated_has_no_problem(suite: Path, tmp_path: Path) -> None:
    flags = ("--save", str(tmp_path / "new"), "--save-interval", "10", "--evaluate-suite", str(suite))
    assert find(*TINY, *flags, "--evaluate-every", "20") == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--evaluate-every 20", "evaluate-every: evaluates saved checkpoints, got evaluate_every=20, save=None"),
        ("--evaluate-every 15 --save new", "evaluate-every: must be a multiple of the save interval, got"),
        ("--evaluate-every 0 --save new", "evaluate-every: must be at least 1, got evaluate_every=0"),
        ("--save new", "evaluate-suite: has no effect without --evaluate-every"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    problems = find(*TINY, "--save-interval", "10", "--evaluate-suite", str(suite), *flags.split())
    assert any(message in problem for problem in problems), problems


def test_the_suite_is_needed_and_read(suite: Path, tmp_path: Path) -> None:
    flags = ("--save", str(tmp_path / "new"), "--save-interval", "10", "--evaluate-every", "10")
    (problem,) = find(*TINY, *flags)
    assert "evaluate-suite: must be given with --evaluate-every" in problem
    suite.write_text("tasks = []\nshots = 5\n")
    (problem,) = find(*TINY, *flags, "--evaluate-suite", str(suite))
    assert "evaluate-suite: " in problem
    assert "shots must be a known field" in problem
    suite.write_text('domains = { zh = "zh.jsonl" }\nlimit = 5\n')
    (problem,) = find(*TINY, *flags, "--evaluate-suite", str(suite))
    assert "evaluate-suite: limit: acts on tasks" in problem
