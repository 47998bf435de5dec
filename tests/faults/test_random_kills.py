"""Ranks and launchers killed at random moments: in steps, evaluations, saves, loads and restarts.

KILLS and KILL_SEED choose another number and other moments: KILLS=200 bash tests/run.sh tests/faults -m long
"""

import json
import os
import random
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launched_runs import LaunchedRun, read_events, wait_until
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_lines, write_toy_data

pytestmark = [pytest.mark.distributed, pytest.mark.long]
NUM_KILLS, SEED = int(os.environ.get("KILLS", "20")), int(os.environ.get("KILL_SEED", "1"))
NUM_STEPS, SAVE_INTERVAL = 40, 4
LONGEST_START_S = 4.0  # about as long as ranks start on idle cores
LONGEST_STEP_S = 0.3  # a step, with an evaluation or a save
EXACT = ("step", "loss", "grad_norm", "lr", "num_samples")
VALIDATION = ("step", "loss")


def read_curve(save_dir: Path) -> list[tuple[object, ...]]:
    steps = [line for line in read_lines(save_dir / "metrics.jsonl") if "loss" in line]
    validations = read_lines(save_dir / "validation.jsonl")
    return [tuple(line[name] for name in EXACT) for line in steps] + [
        tuple(line[name] for name in VALIDATION) for line in validations
    ]


def test_no_kill_changes_a_bit_or_loses_more_than_a_save(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    data = write_toy_data(tmp_path / "data", num_documents=120)
    flags = (
        *(*TOY_MODEL, *TOY_SCHEDULE, "--hidden-dropout", "0.1", "--data-path", data, "--split", "90,10,0"),
        *("--tensor-model-parallel-size", "2", "--train-iters", str(NUM_STEPS), "--save-interval", str(SAVE_INTERVAL)),
        *("--eval-interval", "5", "--eval-iters", "1"),
    )

    def launch(save_dir: Path) -> LaunchedRun:
        launcher = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1000")
        return LaunchedRun(*launcher, "--", *flags, "--save", str(save_dir))

    whole = tmp_path / "whole"
    run = launch(whole)
    assert run.wait() == 0, run.log
    expected = read_curve(whole)

    kills, lost, num_runs = 0, [], 0
    while kills < NUM_KILLS:
        num_runs += 1
        save_dir = tmp_path / f"killed-{num_runs}"
        run = launch(save_dir)
        while kills < NUM_KILLS and not run.has_ended:
            if chance.random() < 0.3:
                time.sleep(chance.uniform(0.0, LONGEST_START_S))
            else:
                wait_for_steps(run, save_dir, chance.randint(1, 2 * SAVE_INTERVAL))
                time.sleep(chance.uniform(0.0, LONGEST_STEP_S))
            is_launcher = chance.random() < 0.25
            try:
                victims = [psutil.Process(run.pid)] if is_launcher else run.list_ranks()
                chance.choice(victims).kill()
            except (psutil.NoSuchProcess, IndexError):  # between two attempts
                continue
            kills += 1
            if is_launcher:
                run.wait()  # -9, or 0 if the run had just ended
                run = launch(save_dir)
        while True:
            code = run.wait()
            if code == 0:
                break
            # Three restarts without a new checkpoint end a run; a person then starts it again.
            assert "restarts in a row ended before the next checkpoint" in run.log, run.log[-4000:]
            run = launch(save_dir)
        assert "Traceback" not in run.log
        assert read_curve(save_dir) == expected
        lost += [event["num_lost_steps"] for event in read_events(save_dir, "rank-failed")]
    # A save is written while training goes on, so the newest complete one may be one interval older.
    assert max(lost, default=0) <= 2 * SAVE_INTERVAL
    report = {"kills": kills, "runs": num_runs, "restarts": len(lost), "most steps lost": max(lost, default=0)}
    print(json.dumps(report | {"mean steps lost": round(sum(lost) / max(1, len(lost)), 2)}))


def wait_for_steps(run: LaunchedRun, save_dir: Path, more: int) -> None:
    """Until the run has finished so many more steps, or has ended."""

    def count() -> int:
        path = save_dir / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    wanted = count() + more
    wait_until(lambda: run.has_ended or count() >= wanted, run=run)
