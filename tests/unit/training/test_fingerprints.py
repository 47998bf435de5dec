"""What a rank records of its tensors, and where two runs differ first."""

from pathlib import Path

import pytest
import torch

from megatron_hammer.errors import DataError
from megatron_hammer.training.fingerprints import (
    FOLDER,
    FingerprintFile,
    StepFingerprint,
    find_file,
    find_first_difference,
    hash_tensor,
    read_run,
)


def record(folder: Path, steps: range, *, rank: int = 0, interval: int = 1, weight: float = 1.0) -> None:
    """Steps of a process that trains one parameter."""
    model = torch.nn.Linear(2, 1, bias=False)
    file = FingerprintFile(folder, rank, interval)
    for step in steps:
        file.begin_step(step)
        file.add_batch({"tokens": torch.full((2, 3), step), "labels": None})
        model.weight.grad = torch.full((1, 2), float(step))
        file.add_gradients([model])
        with torch.no_grad():
            model.weight.fill_(weight * step)
        file.end_step([model])


def test_a_process_that_resumes_replaces_the_steps_that_run_again(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6))
    record(tmp_path, range(4, 8))
    steps = read_run(tmp_path)[0]
    assert list(steps) == [1, 2, 3, 4, 5, 6, 7]
    assert steps[2].batch == {"0.tokens": hash_tensor(torch.full((2, 3), 2))}
    assert steps[2].gradients == {"weight": hash_tensor(torch.full((1, 2), 2.0))}


def test_only_every_nth_step_is_recorded(tmp_path: Path) -> None:
    record(tmp_path, range(1, 8), interval=3)
    assert list(read_run(tmp_path)[0]) == [3, 6]


def test_the_first_difference_is_that_of_the_earliest_step_and_kind(tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    for rank in range(2):
        record(one, range(1, 4), rank=rank)
        record(two, range(1, 4), rank=rank, weight=1.0 if rank == 0 else 2.0)
    record(three, range(1, 3))
    runs = [read_run(folder) for folder in (one, two, three)]
    assert find_first_difference(runs[0], runs[0]) is None
    assert find_first_difference(runs[1], runs[0]) == "differs first at step 1, in its weights, on rank 1: weight"
    assert find_first_difference(runs[2], runs[0]) == "has 1 ranks instead of 2"
    shorter = {rank: {step: line for step, line in of_rank.items() if step < 3} for rank, of_rank in runs[0].items()}
    assert find_first_difference(shorter, runs[0]) == "has no fingerprints to compare at step 3 of rank 0"


def test_the_batch_comes_before_what_follows_from_it() -> None:
    mine, other = (
        {0: {1: StepFingerprint(step=1, batch={"0.tokens": value}, gradients={"w": value}, weights={"w": value})}}
        for value in (1, 2)
    )
    assert find_first_difference(mine, other) == "differs first at step 1, in its batch, on rank 0: 0.tokens"


def test_the_sign_of_zero_and_the_type_count() -> None:
    assert hash_tensor(torch.tensor([0.0])) != hash_tensor(torch.tensor([-0.0]))
    assert hash_tensor(torch.ones(3, dtype=torch.bfloat16)) != hash_tensor(torch.ones(3, dtype=torch.float16))


def test_a_folder_without_fingerprints_and_a_broken_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold the fingerprints of a run, got none.*--fingerprint-interval"):
        read_run(tmp_path / FOLDER)
    record(tmp_path, range(1, 3))
    path = find_file(tmp_path, 0)
    path.write_text("{}\n" + path.read_text() + '{"step": 3, "ba')
    with pytest.raises(DataError, match=r"rank-00000.jsonl:1: "):
        read_run(tmp_path)
