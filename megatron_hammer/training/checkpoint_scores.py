"""Scores of a running job's checkpoints: with --evaluate-every, another process evaluates them beside the training.

It is `hammer evaluate` on the CPU, or where the suite says, one checkpoint after the other. Its scores come into
scores.jsonl beside the metrics. Not into metrics.jsonl: they arrive later than the lines of the steps after them. A
checkpoint without a line there is kept (saving/retention.py) and is evaluated when the run continues, so a kill loses
nothing. An evaluation that fails is a warning, an event and a line, and never the end of a run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint_files.iterations import list_iterations
from megatron_hammer.config.environment import DEFAULTS
from megatron_hammer.training.metrics import LineFile, drop_lines_from
from megatron_hammer.training.supervision.launcher.events import EVENTS_FILE, EventLog
from megatron_hammer.training.supervision.log_folder import find_log_dir

COMMAND = "megatron_hammer.cli.evaluate"
SCORES_FILE = "scores.jsonl"
LOG_FILE, OUTPUT_FILE = "evaluation.log", "evaluation.json"
NICENESS = 10  # training comes first where both want the same core
LATE_CHECKPOINTS = 3  # so many that wait are worth a warning: they are kept on the disk
# By these the process would take itself for a rank of the run.
_PLACES = (*DEFAULTS, "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = ("TORCHELASTIC_", "HAMMER_", "SLURM_", "PMI", "OMPI_")


def find_scores_path(metrics_path: Path) -> Path:
    return metrics_path.with_name(SCORES_FILE)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The lines of scores.jsonl that hold scores or a failure; a line that was cut off by a kill is left out."""
    lines = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether the checkpoint of a step is evaluated: at every multiple, and the last one of the run."""
    return step > 0 and (step % every == 0 or step == last_step)


def select_unscored(iterations: Collection[int], scores_path: Path, every: int, last_step: int) -> list[int]:
    """Those that are due and have no line yet."""
    done = {line["step"] for line in read_scores(scores_path)}
    return [step for step in iterations if step not in done and is_due(step, every, last_step)]


def flatten_scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a line, by name: ceval-ppl/acc/5-shot."""
    return {
        f"{score['task']}/{score['metric']}/{score['num_fewshot']}-shot": score["value"]
        for score in line.get("scores", ())
        if score["value"] is not None
    }


class CheckpointScorer:
    """Used by the one rank that records. say: what a person reads. publish: gets the scores of a step by name.

    every: in steps. last_step: of the run. time_limit_s: of one evaluation; a run waits for its last ones.
    """

    def __init__(
        self, save_dir: Path, suite_path: Path, scores_path: Path, *, every: int, last_step: int, time_limit_s: float,
        say: Callable[[str], None], publish: Callable[[dict[str, float], int], None],
    ):  # fmt: skip
        self.save_dir, self.suite_path, self.scores_path = save_dir, suite_path, scores_path
        self._every, self._last_step, self._time_limit_s = every, last_step, time_limit_s
        self._say, self._publish = say, publish
        self._events = EventLog(save_dir / EVENTS_FILE)
        self._log_path, self._output_path = (find_log_dir(save_dir) / name for name in (LOG_FILE, OUTPUT_FILE))
        self._waiting: deque[int | None] = deque()
        self._current: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._file: LineFile | None = None
        self._started_at_s = 0.0
        self._is_late = self._is_awaited = False

    def begin(self, first_step: int) -> None:
        """The run is about to train its step `first_step`: forget scores of what it saves again, resume the others.

        First the suite itself is tried without a model, so that missing data are told at the start of a run.
        """
        self.scores_path.parent.mkdir(parents=True, exist_ok=True)
        drop_lines_from(self.scores_path, first_step)
        self._file = LineFile(self.scores_path)
        saved = [step for step in list_iterations(self.save_dir) if step < first_step]
        self._waiting += [None, *select_unscored(saved, self.scores_path, self._every, self._last_step)]
        self.poll()

    def add(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        if is_due(step, self._every, self._last_step):
            self._waiting.append(step)
            if len(self._waiting) >= LATE_CHECKPOINTS and not self._is_late:
                self._is_late = True
                self._say(
                    f"evaluation: {len(self._waiting)} checkpoints wait for it and are kept until then. Use a larger "
                    "--evaluate-every, or a limit in the suite."
                )

    def poll(self) -> None:
        """Take the scores of an evaluation that has ended, and start the next one. Never waits."""
        if self._process is not None and self._process.poll() is not None:
            self._collect(self._process.returncode)
        elif self._process is not None and time.monotonic() - self._started_at_s > self._time_limit_s:
            self._end_process()
            self._fail(f"took longer than {self._time_limit_s / 60:g} minutes, time_limit_minutes of the suite")
        if self._process is None and self._waiting:
            self._current = self._waiting.popleft()
            self._start()

    def is_busy(self) -> bool:
        """Whether scores are still to come; moves on as `poll` does. The first call says what is awaited."""
        self.poll()
        steps = self._list_left()
        if steps and not self._is_awaited:
            self._is_awaited = True
            self._say(f"evaluation: waiting for the scores of {_name_steps(steps)}")
        return self._process is not None or bool(self._waiting)

    def finish(self) -> None:
        """Leave no process, and say which checkpoints have no scores."""
        left = self._list_left()
        self._end_process()
        if left:
            self._say(f"evaluation: {_name_steps(left)} not scored; the same command continues with it")
        if self._file is not None:
            self._file.close()

    def _end_process(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that a task has started
            self._process.wait()
            self._process = None

    def _list_left(self) -> list[int]:
        return [step for step in (self._current, *self._waiting) if step is not None]

    def _start(self) -> None:
        what = ["--check"] if self._current is None else ["--iterations", str(self._current)]
        load = ["--load", str(self.save_dir)]
        command = [sys.executable, "-m", COMMAND, *load, "--suite", str(self.suite_path), "--json", *what]
        self._started_at_s = time.monotonic()
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("ab") as log, self._output_path.open("wb") as output:
                self._process = subprocess.Popen(
                    [*command, "--parent-process", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    env=describe_environment(os.environ),
                    start_new_session=True,  # Ctrl-C is for the run, which then ends the evaluation
                )
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        except OSError as error:
            self._fail(f"cannot be started: {error.strerror}")

    def _collect(self, exit_code: int) -> None:
        self._process = None
        if exit_code:
            self._fail(f"ended with exit code {exit_code}: {_read_last_line(self._log_path)}")
        elif self._current is not None:
            try:
                scores = json.loads(self._output_path.read_bytes())["models"][0]["scores"]
            except (OSError, ValueError, LookupError, TypeError):  # also where a task's own code prints
                self._fail(f"must write scores to {self._output_path}, got something else")
                return
            line = {"step": self._current, "scores": scores, "elapsed_s": time.monotonic() - self._started_at_s}
            self._append(line)
            headlines = [score for score in scores if not score["is_part"] and score["value"] is not None]
            told = ", ".join(f"{name} {value:.4f}" for name, value in flatten_scores({"scores": headlines}).items())
            self._say(f"step {self._current}  evaluation: {told}")
            self._publish(flatten_scores(line), self._current)
        self._current = None

    def _fail(self, reason: str) -> None:
        """One line for a person, one event, and one line of scores.jsonl so that the checkpoint need not be kept."""
        what = "the suite" if self._current is None else f"step {self._current}"
        self._say(f"warning: evaluation of {what} {reason} (all of it: {self._log_path})")
        self._events.write("evaluation-failed", f"evaluation of {what} {reason}", step=self._current)
        if self._current is not None:
            self._append({"step": self._current, "failure": reason})
        self._current = None

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.append(line)


def describe_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """That of the run without what makes a process one of its ranks."""
    return {
        name: value for name, value in environment.items() if name not in _PLACES and not name.startswith(_LAUNCHERS)
    }


def _name_steps(steps: list[int]) -> str:
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}"


def _read_last_line(path: Path) -> str:
    """Of a log: the last sentence of a user error, else the last line."""
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()]
        told = [line for line in lines[-20:] if line.startswith("error: ")]
        return (told or lines or [""])[-1].removeprefix("error: ")[:400]
    return "no log"
