"""Checkpoints that are written while training goes on hold the state of their step, whatever happens meanwhile."""

import signal
from pathlib import Path

import pytest
import torch

from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_tracker, run_program, train

pytestmark = pytest.mark.distributed
LATE_WRITES = ROOT / "tests" / "helpers" / "late_writes.py"
STEPS = ("--train-iters", "5", "--save-interval", "2", "--mock-data")
# On one rank without the distributed optimizer, what is saved are the live tensors themselves, not gathered copies.
LAYOUTS = {"live": (1, ("--no-distributed-optimizer",)), "gathered": (2, ("--precision", "bf16"))}


def read_tensors(save: Path, step: int) -> dict[str, torch.Tensor]:
    store = TorchDistStore(save / f"iter_{step:07d}")
    store.validate()
    shapes = {key: tensor.shape for key, tensor in store.tensors.items()}
    return {key: store.read(key, [0] * len(shape), shape).clone() for key, shape in shapes.items()}


def list_different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def save_late(save: Path, layout: str, writes: str = "late", exit_code: int = 0) -> str:
    """A run with late_writes.py; returns its stderr."""
    num_processes, flags = LAYOUTS[layout]
    flags = (*TOY_MODEL, *TOY_SCHEDULE, *STEPS, *flags, "--save", str(save))
    result = run_program(LATE_WRITES, num_processes, *flags, WRITES=writes)
    assert result.returncode == exit_code, result.stderr[-3000:]
    return result.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_late_writes_hold_the_state_of_their_step(tmp_path: Path, layout: str) -> None:
    num_processes, flags = LAYOUTS[layout]
    flags = (*TOY_MODEL, *TOY_SCHEDULE, *STEPS, *flags, "--save", str(tmp_path / "at once"))
    train(num_processes, tmp_path / "metrics.jsonl", *flags, "--no-async-save")
    save_late(tmp_path / "late", layout)
    assert read_tracker(tmp_path / "late") == 5  # the end of training has waited for the last one
    late = {step: read_tensors(tmp_path / "late", step) for step in (2, 4, 5)}
    for step, tensors in late.items():
        assert list_different(tensors, read_tensors(tmp_path / "at once", step)) == []
    for earlier, later in ((2, 4), (4, 5)):
        unchanged = set(late[earlier]) - set(list_different(late[earlier], late[later]))
        assert unchanged == set(), f"{earlier} and {later}"


def test_a_kill_during_a_write_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    save_late(tmp_path / "killed", "live", "killed", exit_code=128 + signal.SIGKILL)
    assert read_tracker(tmp_path / "killed") == 2
    flags = (*TOY_MODEL, *TOY_SCHEDULE, *STEPS, *LAYOUTS["live"][1])
    save = ("--save", str(tmp_path / "killed"))
    resumed = train(1, tmp_path / "killed" / "metrics.jsonl", *flags, *save)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5]
    whole = train(1, tmp_path / "whole.jsonl", *flags[: flags.index("--save-interval")], "--mock-data", *flags[-1:])
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def test_without_copies_they_would_not(tmp_path: Path) -> None:
    save_late(tmp_path / "late", "live")
    save_late(tmp_path / "uncopied", "live", "uncopied")
    wrong = ""
    try:
        different = list_different(read_tensors(tmp_path / "late", 2), read_tensors(tmp_path / "uncopied", 2))
        wrong = " ".join(different)
    except CheckpointError as error:  # it changed between hashing and writing
        wrong = str(error)
    assert "exp_avg.decoder.final_layernorm.weight" in wrong or "must have the contents that were saved" in wrong
