from pathlib import Path

import pytest

from megatron_hammer.training.supervision.resuming import continue_own_run, read_saved_step


@pytest.mark.parametrize(("text", "step"), [("70", 70), ("70\n", 70), ("", 0), ("release", 0), ("-3", 0)])
def test_the_step_is_that_of_the_tracker_file(tmp_path: Path, text: str, step: int) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert read_saved_step(tmp_path) == step


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    assert (read_saved_step(None), read_saved_step(tmp_path), read_saved_step(tmp_path / "none")) == (0, 0, 0)


def test_a_run_that_began_from_another_one_resumes_from_its_own_checkpoints() -> None:
    began = ["--preset", "x", "--load", "other", "--ckpt-step=7", "--finetune", "--save", "own", "--lr", "1"]
    assert continue_own_run(began, Path("own")) == ("--preset", "x", "--save", "own", "--lr", "1", "--load", "own")
    began = ["--save", "own", "--load=other", "--no-load-rng", "--pretrained-checkpoint", "base"]
    assert continue_own_run(began, Path("own")) == ("--save", "own", "--load", "own")


def test_other_arguments_are_left_alone() -> None:
    arguments = ["--save", "own", "--load-hf", "model", "--loader", "x"]
    assert continue_own_run(arguments, Path("own")) == tuple(arguments)
