"""Resumed training equals uninterrupted training: bit for bit at the same layout, closely at another one."""

import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_hammer.checkpoint.surgery.reshard import TargetLayout, reshard
from tests.helpers.launched_runs import LaunchedRun, wait_until
from tests.helpers.training_runs import (
    TOY_MODEL,
    TOY_MOE,
    TOY_SCHEDULE,
    read_lines,
    read_tracker,
    start,
    train,
    wait_until_gone,
    write_toy_data,
)
from tests.helpers.training_runs import wait_until as wait_until_started

pytestmark = pytest.mark.distributed
NUM_STEPS = 24
SAVE_INTERVAL = 8
TP2 = ("--tensor-model-parallel-size", "2")
RATES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr")
# What must be equal in every step; times and memory differ between any two runs.
EXACT = ("step", "loss", "grad_norm", "lr", "num_samples", "num_tokens", "loss_scale", "is_skipped")


def exact_values(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in EXACT) for line in lines]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    directory = tmp_path_factory.mktemp("data")
    data = write_toy_data(directory / "data", num_documents=25)
    # Two epochs and a third begun, in our own order, so that the record of it is written by several ranks too.
    order = ("--data-order", "epochwise", "--split", "100,0,0")
    # Dropout, so that the random state counts too; the schedule is fixed, so that it does not depend on where we stop.
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    return (*TOY_MODEL, *dropout, *TOY_SCHEDULE, "--train-iters", str(NUM_STEPS), "--data-path", data, *order)


def saving(directory: Path) -> tuple[str, ...]:
    return ("--save", str(directory), "--save-interval", str(SAVE_INTERVAL))


@pytest.fixture(scope="module")
def uninterrupted(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a whole run at TP2, with its metrics.jsonl."""
    save = tmp_path_factory.mktemp("uninterrupted")
    train(2, save / "metrics.jsonl", *flags, *TP2, *saving(save))
    return save


def has_step(metrics_path: Path, step: int) -> bool:
    return metrics_path.exists() and len(metrics_path.read_text().splitlines()) >= step


def test_kill_minus_nine_and_resume_is_bit_exact(flags: tuple[str, ...], uninterrupted: Path, tmp_path: Path) -> None:
    all_flags = (*flags, *TP2, *saving(tmp_path))
    process = start(2, *all_flags)
    # any step will do, if it is not so late that the run could end by itself; the message names it
    kill_after = random.randint(SAVE_INTERVAL + 1, NUM_STEPS - SAVE_INTERVAL)
    wait_until_started(lambda: has_step(tmp_path / "metrics.jsonl", kill_after), process)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) == 2
    process.kill()  # the launcher alone: its ranks, in sessions of their own, must not train on
    process.communicate(timeout=60)  # nor may anything hold stdout, for which `launch ... | tee log` would wait
    assert wait_until_gone(descendants, timeout_s=60) == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < NUM_STEPS, f"{kill_after=}"
    resumed = train(2, tmp_path / "metrics.jsonl", *all_flags)
    assert exact_values(resumed) == exact_values(read_lines(uninterrupted / "metrics.jsonl")), f"{kill_after=}"


def test_a_scheduler_stops_a_run_after_its_first_save(
    flags: tuple[str, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    """SLURM sends SIGTERM to every process of a job: the launcher, the ranks and what they have started."""
    all_flags = (*flags, *TP2, *saving(tmp_path), "--num-workers", "1")
    job = LaunchedRun("--standalone", "--nproc-per-node", "2", "--", *all_flags)
    wait_until(lambda: read_tracker(tmp_path) > 0, run=job)
    launcher = psutil.Process(job.pid)
    descendants = launcher.children(recursive=True)
    for one in (*descendants, launcher):
        one.send_signal(signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM, job.log[-3000:]
    assert "Traceback" not in job.log, job.log[-3000:]
    assert "the same command continues from there" in job.log
    stopped_at = read_lines(tmp_path / "metrics.jsonl")[-1]["step"]
    assert SAVE_INTERVAL < read_tracker(tmp_path) == stopped_at
    assert wait_until_gone(descendants, timeout_s=60) == []
    resumed = train(2, tmp_path / "metrics.jsonl", *all_flags)
    assert exact_values(resumed) == exact_values(read_lines(uninterrupted / "metrics.jsonl"))


NO_DROPOUT = ("--hidden-dropout", "0", "--attention-dropout", "0")  # its draws differ between layouts


@pytest.fixture(scope="module")
def without_dropout(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("without_dropout")
    train(2, save / "metrics.jsonl", *flags, *NO_DROPOUT, *TP2, *saving(save))
    return save


@pytest.mark.parametrize(
    ("num_processes", "layout"),
    [
        pytest.param(2, ("--pipeline-model-parallel-size", "2"), id="pp2"),
        pytest.param(2, (), id="dp2"),
        pytest.param(4, (*TP2, "--pipeline-model-parallel-size", "2"), id="tp2-pp2"),
    ],
)
def test_resume_at_another_layout(
    flags: tuple[str, ...], without_dropout: Path, tmp_path: Path, num_processes: int, layout: tuple[str, ...]
) -> None:
    """Weights, moments, schedule and data order carry over."""
    resume = ("--load", str(without_dropout), "--ckpt-step", str(SAVE_INTERVAL))
    resumed = train(num_processes, tmp_path / "resumed.jsonl", *flags, *NO_DROPOUT, *layout, *resume)
    assert [line["step"] for line in resumed] == list(range(SAVE_INTERVAL + 1, NUM_STEPS + 1))
    whole = read_lines(without_dropout / "metrics.jsonl")
    for line, expected in zip(resumed, whole[SAVE_INTERVAL:], strict=True):
        assert line["lr"] == expected["lr"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def train_and_resume(tmp_path: Path, optimizer: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Four steps of a model with experts, and its last two again from the checkpoint; returns flags and all lines."""
    flags = (*TOY_MODEL, *TOY_MOE, *TOY_SCHEDULE, "--optimizer", optimizer, "--no-distributed-optimizer", "--mock-data")
    flags = (*flags, "--train-iters", "4")
    saving = ("--save", str(tmp_path / "run"), "--save-interval", "2")
    whole = train(1, tmp_path / "whole.jsonl", *flags, *saving)
    saved = ("--load", str(tmp_path / "run"), "--ckpt-step", "2")
    assert exact_values(train(1, tmp_path / "same.jsonl", *flags, *saved)) == exact_values(whole[2:])
    return flags, whole


def test_lion_resumes_bit_for_bit(tmp_path: Path) -> None:
    train_and_resume(tmp_path, "lion")


def test_muon_with_experts_resumes_bit_for_bit_and_closely_at_another_expert_parallel_size(tmp_path: Path) -> None:
    """Its optimizers are chained by kind, and by experts where these are parallel; resharding adds a link."""
    flags, whole = train_and_resume(tmp_path, "muon")
    reshard(tmp_path / "run", tmp_path / "ep2", TargetLayout(expert_model_parallel_size=2), iteration=2)
    parallel = ("--expert-model-parallel-size", "2", "--load", str(tmp_path / "ep2"))
    resumed = train(2, tmp_path / "ep2.jsonl", *flags, *parallel)
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole[2:]], rel=1e-5)


def test_muon_resumes_bit_for_bit_and_closely_at_another_pipeline_size(tmp_path: Path) -> None:
    muon = ("--optimizer", "muon", "--no-distributed-optimizer", "--train-iters", "4", "--mock-data")
    muon = (*TOY_MODEL, *TOY_SCHEDULE, *muon)
    first = train(1, tmp_path / "m.jsonl", *muon, "--save", str(tmp_path / "run"), "--save-interval", "2")
    # A step of Muon is as long as the learning rate, whatever the gradient, and so the losses differ from Adam's.
    adam = train(1, tmp_path / "adam.jsonl", *TOY_MODEL, *TOY_SCHEDULE, "--train-iters", "4", "--mock-data")
    assert [line["loss"] for line in first] != [line["loss"] for line in adam]
    saved = ("--load", str(tmp_path / "run"), "--ckpt-step", "2")
    resumed = train(1, tmp_path / "same.jsonl", *muon, *saved)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in first[2:]]
    staged = train(2, tmp_path / "pp2.jsonl", *muon, *saved, "--pipeline-model-parallel-size", "2")
    # The norm of the gradient is summed over the stages in another order: 1e-6 was measured.
    assert [line["loss"] for line in staged] == pytest.approx([line["loss"] for line in first[2:]], rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="distributed"),
        pytest.param(("--no-distributed-optimizer",), id="fp32"),
        pytest.param(("--decoupled-lr", "0.0005", "--decoupled-min-lr", "0.0001"), id="decoupled"),
        pytest.param(("--optimizer", "muon", "--no-distributed-optimizer"), id="muon"),
        pytest.param(("--use-mup", "--mup-width-mult", "2"), id="mup"),
    ],
)
def test_a_run_continues_under_other_learning_rates(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The schedule is that of the new rates from the first step, and the moments are the checkpoint's."""
    flags = (*TOY_MODEL, *TOY_SCHEDULE, "--mock-data", "--train-iters", "6", *flags)
    before = train(1, tmp_path / "before.jsonl", *flags, "--save", str(tmp_path / "run"), "--save-interval", "2")[2:]
    resume = ("--load", str(tmp_path / "run"), "--ckpt-step", "2", "--override-opt-param-scheduler")
    ratio = 1.00001  # so small that the curve shows whether the moments are there
    rates = {name: repr(ratio * float(flags[flags.index(name) + 1])) for name in RATES if name in flags}
    now = train(1, tmp_path / "now.jsonl", *flags, *resume, *(text for rate in rates.items() for text in rate))
    assert [line["lr"] for line in now] == pytest.approx([ratio * line["lr"] for line in before], rel=1e-7)
    fresh = train(1, tmp_path / "fresh.jsonl", *flags, *resume, "--no-load-optim")
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):  # measured: at most 2.7e-4, with Muon
        expected = pytest.approx([line[name] for line in before], rel=tolerance)
        assert [line[name] for line in now] == expected
        assert [line[name] for line in fresh] != expected
