"""With a small program in the place of `hammer evaluate`; tests/integration/test_scores_while_training.py has that."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_hammer.training import checkpoint_scores
from megatron_hammer.training.checkpoint_scores import (
    CheckpointScorer,
    describe_environment,
    find_scores_path,
    is_due,
    read_scores,
    select_unscored,
)

# It says which checkpoint it was asked for, and fails or waits where a file tells it to.
PROGRAM = """
import json, os, pathlib, subprocess, sys, time
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
step = int(words[words.index("--iterations") + 1]) if "--iterations" in words else None
with open(here / "asked", "a") as file:
    file.write(json.dumps([step, "RANK" in os.environ]) + "\\n")
if (here / f"hang-{step}").exists():
    (here / "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
while (here / "wait").exists() or (here / f"hang-{step}").exists():
    time.sleep(0.02)
if (here / f"fail-{step}").exists():
    sys.exit("Traceback\\nerror: data-dir: must be there, got none. Copy it.")
if (here / f"print-{step}").exists():
    print("a word of the task's own code")
score = {"task": "exam", "metric": "acc", "num_fewshot": 0, "value": (step or 0) / 100, "is_part": False}
print(json.dumps({"models": [{"scores": [score, {**score, "task": "law", "is_part": True}]}]}))
"""


class Bench:
    """A scorer with what it said and published. every 10 steps, of 25."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.published = folder, [], {}
        (folder / "evaluate_stand_in.py").write_text(PROGRAM)
        self.scores_path = find_scores_path(folder / "metrics.jsonl")

    def build(self, time_limit_s: float = 60) -> CheckpointScorer:
        return CheckpointScorer(
            self.folder, self.folder / "suite.toml", self.scores_path, every=10, last_step=25,
            time_limit_s=time_limit_s,
            say=self.said.append, publish=lambda values, step: self.published.update({step: values}),
        )  # fmt: skip

    @property
    def asked(self) -> list[Any]:
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self, scorer: CheckpointScorer) -> None:
        self.wait_until(lambda: not scorer.is_busy())
        scorer.finish()

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 30
        while not is_reached():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(checkpoint_scores, "COMMAND", "evaluate_stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("RANK", "0")
    return Bench(tmp_path)


def test_every_nth_checkpoint_and_the_last_one_are_scored_one_after_the_other(bench: Bench) -> None:
    scorer = bench.build()
    scorer.begin(1)
    for step in (5, 10, 15, 20, 25):
        scorer.add(step)
        scorer.poll()
    bench.end(scorer)
    # First without a checkpoint, to try the suite.
    assert bench.asked == [[None, False], [10, False], [20, False], [25, False]]
    assert [(line["step"], line["scores"][0]["value"]) for line in read_scores(bench.scores_path)] == [
        (10, 0.1), (20, 0.2), (25, 0.25),
    ]  # fmt: skip
    assert bench.published[20] == {"exam/acc/0-shot": 0.2, "law/acc/0-shot": 0.2}
    assert "step 20  evaluation: exam/acc/0-shot 0.2000" in bench.said
    assert "evaluation: waiting for the scores of steps 10, 20, 25" in bench.said
    assert any(line.startswith("evaluation: 3 checkpoints wait") for line in bench.said)


def test_a_failure_is_one_warning_one_event_and_one_line(bench: Bench) -> None:
    (bench.folder / "fail-10").touch()
    scorer = bench.build()
    scorer.begin(1)
    scorer.add(10)
    scorer.add(20)
    bench.end(scorer)
    (warning,) = [line for line in bench.said if line.startswith("warning: ")]
    assert "evaluation of step 10 ended with exit code 1: data-dir: must be there, got none" in warning
    (event,) = [json.loads(line) for line in (bench.folder / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"]) == ("evaluation-failed", 10)
    failed, scored = read_scores(bench.scores_path)
    assert failed["step"] == 10
    assert "data-dir" in failed["failure"]
    assert scored["step"] == 20


def test_an_output_that_is_not_only_scores_does_not_end_the_run(bench: Bench) -> None:
    (bench.folder / "print-10").touch()
    scorer = bench.build()
    scorer.begin(1)
    scorer.add(10)
    scorer.add(20)
    bench.end(scorer)
    failed, scored = read_scores(bench.scores_path)
    assert "evaluation.json, got something else" in failed["failure"]
    assert scored["scores"]


def test_a_program_that_cannot_be_started_does_not_end_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_scores.sys, "executable", str(bench.folder / "missing"))
    scorer = bench.build()
    scorer.begin(1)
    scorer.add(10)
    bench.end(scorer)
    assert [line["step"] for line in read_scores(bench.scores_path)] == [10]
    assert sum("cannot be started" in line for line in bench.said) == 2


def test_an_evaluation_that_hangs_is_ended_and_the_next_one_starts(bench: Bench) -> None:
    (bench.folder / "hang-10").touch()
    scorer = bench.build(time_limit_s=5)
    scorer.begin(1)
    scorer.add(10)
    scorer.add(20)
    bench.end(scorer)
    failed, scored = read_scores(bench.scores_path)
    assert failed["step"] == 10
    assert "longer than 0.0833333 minutes, time_limit_minutes" in failed["failure"]
    assert scored["step"] == 20
    assert not [child for child in psutil.Process().children() if "evaluate_stand_in" in child.cmdline()]
    child = int((bench.folder / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_is_stopped_does_not_wait_and_its_next_start_scores_the_rest(bench: Bench) -> None:
    (bench.folder / "wait").touch()
    for step in (10, 20):
        (bench.folder / f"iter_{step:07d}").mkdir()
    scorer = bench.build()
    scorer.begin(21)
    bench.wait_until(lambda: bench.asked == [[None, False]])
    (process,) = [child for child in psutil.Process().children() if "evaluate_stand_in" in child.cmdline()]
    scorer.finish()
    assert not process.is_running()
    assert "evaluation: steps 10, 20 not scored; the same command continues with it" in bench.said
    (bench.folder / "wait").unlink()
    again = bench.build()
    again.begin(21)
    bench.end(again)
    assert [line["step"] for line in read_scores(bench.scores_path)] == [10, 20]


def test_scores_of_steps_that_run_again_are_dropped(bench: Bench) -> None:
    lines = [{"step": step, "scores": []} for step in (10, 20)]
    bench.scores_path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    scorer = bench.build()
    scorer.begin(11)
    scorer.finish()
    assert [line["step"] for line in read_scores(bench.scores_path)] == [10]


def test_checkpoints_without_a_line_are_the_ones_to_keep(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"step": 10, "scores": []}\n{"step": 20, "failure": "x"}\n')
    assert select_unscored([5, 10, 20, 25, 30], path, every=10, last_step=25) == [25, 30]
    assert select_unscored([10], tmp_path / "missing", every=10, last_step=25) == [10]
    assert not is_due(0, 10, 25)


def test_the_process_is_no_rank_of_the_run() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "HAMMER_ATTEMPT": "0", "PATH": "p"}
    assert describe_environment(environment | {"SLURM_PROCID": "1", "MASTER_PORT": "1"}) == {"PATH": "p"}
