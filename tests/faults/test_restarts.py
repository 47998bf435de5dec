"""Runs that lose a process are started again by their launchers, resume, and give up where they get no further."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.launched_runs import LaunchedRun, find_free_port, read_events, wait_for_step, wait_until
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_lines, read_tracker, write_toy_data

pytestmark = pytest.mark.distributed
NUM_STEPS = 16
SAVE_INTERVAL = 4
ONE_HOST = ("--standalone", "--nproc-per-node", "2")
EXACT = ("step", "loss", "grad_norm", "lr", "num_samples", "is_skipped")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    data = write_toy_data(tmp_path_factory.mktemp("data") / "data", num_documents=25)
    parallel = ("--tensor-model-parallel-size", "2", "--save-interval", str(SAVE_INTERVAL))
    schedule = ("--train-iters", str(NUM_STEPS), "--data-path", data, "--split", "100,0,0")
    return (*TOY_MODEL, *TOY_SCHEDULE, "--hidden-dropout", "0.1", *parallel, *schedule)


@pytest.fixture(scope="module")
def whole_run(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has interrupted."""
    save_dir = tmp_path_factory.mktemp("uninterrupted")
    prometheus = ("--prometheus-file", str(save_dir / "run.prom"))
    run = LaunchedRun(*ONE_HOST, "--", *flags, "--save", str(save_dir), *prometheus)
    assert run.wait() == 0, run.log
    return save_dir


@pytest.fixture(scope="module")
def uninterrupted(whole_run: Path) -> list[tuple[Any, ...]]:
    return select_exact(read_lines(whole_run / "metrics.jsonl"))


def test_a_run_is_repeated_from_its_folder(
    whole_run: Path, uninterrupted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run = LaunchedRun(*ONE_HOST, "--", "--from-run", str(whole_run), "--save", str(tmp_path))
    assert run.wait() == 0, run.log
    assert select_exact(read_lines(tmp_path / "metrics.jsonl")) == uninterrupted
    (start,) = (tmp_path / "run").glob("start-*.json")
    assert json.loads(start.read_text())["data"], "what the data was"
    (config,) = (tmp_path / "run").glob("config-*.json")
    assert json.loads(config.read_text())["adam_beta2"], "every default, too"


def test_monitors_find_the_end_of_a_run(whole_run: Path) -> None:
    beat = json.loads((whole_run / "heartbeat.json").read_text())
    last = read_lines(whole_run / "metrics.jsonl")[-1]
    assert (beat["step"], beat["loss"], beat["restarts"]) == (NUM_STEPS, last["loss"], 0)
    assert beat["checkpoint_step"] == NUM_STEPS, "the last save comes after the last step"
    assert f'hammer_step{{run="{whole_run.name}"}} {NUM_STEPS}\n' in (whole_run / "run.prom").read_text()


def select_exact(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in EXACT) for line in lines]


def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(
    flags: tuple[str, ...], uninterrupted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run = LaunchedRun(*ONE_HOST, "--max-restarts", "2", "--", *flags, "--save", str(tmp_path))
    wait_until(lambda: read_tracker(tmp_path) > 0, run=run)  # it is written while the next steps are trained
    run.list_ranks()[1].kill()
    assert run.wait() == 0, run.log
    assert select_exact(read_lines(tmp_path / "metrics.jsonl")) == uninterrupted
    failed, restart = read_events(tmp_path, "rank-failed", "restart")
    assert (failed["rank"], failed["exit_code"]) == (1, -9)
    assert failed["saved_step"] in range(SAVE_INTERVAL, failed["step"] + 1, SAVE_INTERVAL)
    assert restart["num_lost_steps"] == failed["step"] - failed["saved_step"]
    assert f"from the checkpoint of step {failed['saved_step']}" in restart["message"]
    assert [event["attempt"] for event in read_events(tmp_path, "attempt-started")] == [0, 1]
    assert read_events(tmp_path)[-1]["event"] == "run-ended"
    assert f"error: rank 1 on {failed['host']} was killed by SIGKILL" in run.log


def test_two_hosts_recover_from_a_killed_rank_and_from_killed_launchers(
    flags: tuple[str, ...], uninterrupted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Numbered as for torchrun's static rendezvous, which recovers from neither."""
    port = find_free_port()

    def launch(node_rank: int) -> LaunchedRun:
        nodes = ("--nnodes", "2", "--node-rank", str(node_rank), "--nproc-per-node", "1", "--max-restarts", "4")
        master = ("--master-addr", "localhost", "--master-port", str(port))
        return LaunchedRun(*nodes, *master, "--", *flags, "--save", str(tmp_path))

    # The second one first: the order must come from the numbers.
    second, first = launch(1), launch(0)
    wait_for_step(first, tmp_path, SAVE_INTERVAL + 1)
    second.list_ranks()[0].kill()
    wait_for_step(first, tmp_path, SAVE_INTERVAL * 2 + 1)
    psutil.Process(second.pid).kill()
    replacement = launch(1)
    wait_for_step(first, tmp_path, SAVE_INTERVAL * 3 + 1)
    psutil.Process(first.pid).kill()  # it holds the rendezvous
    returned = launch(0)
    assert (returned.wait(), replacement.wait()) == (0, 0), returned.log + replacement.log
    assert (first.wait(), second.wait()) == (-9, -9)
    assert "error: the launcher of node 0 does not answer; waiting for it." in replacement.log
    assert "Traceback" not in first.log + second.log + returned.log + replacement.log
    assert select_exact(read_lines(tmp_path / "metrics.jsonl")) == uninterrupted
    started = [(event["attempt"], event["ranks"]) for event in read_events(tmp_path, "attempt-started")]
    # A new launcher of node 0 counts anew.
    assert sorted(started) == sorted((attempt, [rank]) for attempt in (0, 1, 2, 0) for rank in (0, 1))
