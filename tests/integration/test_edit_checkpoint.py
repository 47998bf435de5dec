"""The tool as a user runs it: a trained mixture of experts continues at layouts that training alone refuses."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.messages import assert_errors
from tests.helpers.tool_runs import Finished, run_tool, run_tool_here, start_tool
from tests.helpers.toy_training_checkpoint import read_all, training_arguments, write_training_checkpoint
from tests.helpers.training_runs import TOY_MODEL, TOY_MOE, TOY_SCHEDULE, read_lines, run, train, write_toy_data

pytestmark = pytest.mark.integration

TOOL = "checkpoint_convert/edit_checkpoint.py"
NUM_STEPS, SAVE_INTERVAL = 4, 2
SAVING = ("--save-interval", str(SAVE_INTERVAL), "--save")
EP2 = ("--expert-model-parallel-size", "2")


def edit(*arguments: str | Path) -> Finished:
    return run_tool_here(TOOL, *arguments)


def edit_well(*arguments: str | Path) -> str:
    result = edit(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("data")
    data = write_toy_data(folder / "data", num_documents=40)
    schedule = (*TOY_SCHEDULE, "--train-iters", str(NUM_STEPS))
    return (*TOY_MODEL, *TOY_MOE, *schedule, "--data-path", data, "--split", "1,0,0")


@pytest.fixture(scope="module")
def trained(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without expert parallelism, saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    train(1, folder / "metrics.jsonl", *flags, *SAVING, str(folder))
    return folder


@pytest.fixture(scope="module")
def resumed(flags: tuple[str, ...], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its steps 3 and 4 again, from step 2, over two expert-parallel ranks, saved at step 4."""
    folder = tmp_path_factory.mktemp("resumed")
    summary = edit_well("reshard", "--load", trained, "--iteration", "2", "--save", folder, *EP2)
    assert "iteration 2 from TP1 PP1 EP1 to TP1 PP1 EP2; 13 weights and 39 optimizer tensors in and out" in summary
    train(2, folder / "metrics.jsonl", *flags, *EP2, "--load", str(folder), *SAVING, str(folder))
    return folder


def test_training_continues_with_expert_parallelism(trained: Path, resumed: Path) -> None:
    before = read_lines(trained / "metrics.jsonl")[SAVE_INTERVAL:]
    after = read_lines(resumed / "metrics.jsonl")
    assert [line["step"] for line in after] == [3, 4]
    for old, new in zip(before, after, strict=True):
        # measured 1e-7: the ranks' gradients are summed in another order
        assert new["loss"] == pytest.approx(old["loss"], rel=2e-6)
        assert new["grad_norm"] == pytest.approx(old["grad_norm"], rel=2e-5)
        assert new["lr"] == old["lr"]


def test_training_alone_refuses_and_names_the_tool(flags: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    result = run(2, *flags, *EP2, "--load", str(trained))
    assert result.returncode == 2
    assert "hammer checkpoint edit reshard --expert-model-parallel-size 2" in result.stderr


def test_an_edit_and_its_inverse_give_the_checkpoint_of_an_unedited_run(
    trained: Path, resumed: Path, tmp_path: Path
) -> None:
    """Over two ranks and back to one: the same keys, groups and, but for the order of sums, numbers."""
    edit_well("reshard", "--load", resumed, "--save", tmp_path / "ep1", "--expert-model-parallel-size", "1")
    found, store = read_all(tmp_path / "ep1", "iter_0000004")
    written, of_two_ranks = read_all(resumed, "iter_0000004")
    assert found.keys() == written.keys()
    assert [key for key in found if not torch.equal(found[key], written[key])] == []
    expected, of_one_rank = read_all(trained, "iter_0000004")
    assert store.common_state["optimizer"] == of_one_rank.common_state["optimizer"]
    assert of_two_ranks.common_state["optimizer"] != of_one_rank.common_state["optimizer"]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_the_tool_writes_the_same_layout_as_megatron(resumed: Path, trained: Path) -> None:
    """Two ranks cut every tensor into the boxes that the tool made for them at step 2."""
    made, by_megatron = (read_all(resumed, f"iter_000000{step}")[1].tensors for step in (2, 4))
    assert {key: set(stored.chunks) for key, stored in made.items()} == {
        key: set(stored.chunks) for key, stored in by_megatron.items()
    }


def test_weights_alone_start_a_new_run(flags: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    summary = edit_well("weights-only", "--load", trained, "--save", tmp_path / "weights")
    assert "13 weights kept and read back equal, 39 optimizer tensors and 2 states of the run dropped" in summary
    mean = edit_well("average", trained / "iter_0000002", trained, "--weights", "0,1", "--save", tmp_path / "mean")
    assert f"{tmp_path / 'mean'}: mean of 2 checkpoints; 13 weights out" in mean
    weights, averaged = (read_all(tmp_path / name, "release")[0] for name in ("weights", "mean"))
    assert all(torch.equal(tensor, averaged[key]) for key, tensor in weights.items())
    edit_well("resize-vocab", "--load", tmp_path / "mean", "--vocab-size", "1010", "--save", tmp_path / "wider")
    # Another number of tokens, layout and schedule: a release is a new run at step 1 from trained weights.
    changes = ("--vocab-size", "1010", "--train-iters", "1", "--lr-warmup-iters", "0", *EP2)
    (line,) = train(2, tmp_path / "metrics.jsonl", *flags, *changes, "--load", str(tmp_path / "wider"))
    assert (line["step"], line["num_samples"]) == (1, 8)
    assert line["loss"] < read_lines(trained / "metrics.jsonl")[0]["loss"] - 0.1


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_killed_edit_leaves_nothing_that_loads(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    rows = {name: torch.randn(700_000, 24) for name in ("embedding.word_embeddings.weight", "output_layer.weight")}
    write_training_checkpoint(tmp_path / "old", tensors=rows, arguments=training_arguments(vocab_size=700_000))
    command = ("weights-only", "--load", tmp_path / "old", "--save", tmp_path / "new")
    with start_tool(TOOL, *command) as process:
        deadline_s = time.monotonic() + 60
        while not any(path.stat().st_size > 1_000_000 for path in tmp_path.glob("new/release.*.partial/__0_0.distcp")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    assert process.returncode == exit_code
    left = [path.name for path in (tmp_path / "new").glob("*")]
    assert len(left) == (number == signal.SIGKILL)
    assert all(re.fullmatch(r"release\.\w{16}\.partial", name) for name in left)
    refused = edit("weights-only", "--load", tmp_path / "new", "--save", tmp_path / "other")
    assert refused.returncode == 2
    again = run_tool(TOOL, *command)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in (tmp_path / "new").glob("*")} == {"release", "latest_checkpointed_iteration.txt"}


def test_every_subcommand_on_a_toy(tmp_path: Path) -> None:
    """Messages and summaries, on stderr and stdout."""
    write_training_checkpoint(tmp_path / "run")
    load = ("--load", tmp_path / "run")
    upcycled = ("--num-experts", "6", "--moe-router-topk", "4", "--moe-upcycling-granularity", "2")
    summary = edit_well("upcycle", *load, "--save", tmp_path / "moe", *upcycled)
    assert "iteration 10 with 6 experts of width 10, the dense function up to rounding" in summary
    layout = edit("reshard", *load, "--save", tmp_path / "tp2", "--tensor-model-parallel-size", "2")
    assert layout.stderr.startswith("note: random states belong to the old ranks and were left out")
    assert "iteration 10 from TP1 PP1 EP1 to TP2 PP1 EP1; 9 weights and 27 optimizer tensors" in layout.stdout
    summary = edit_well("resize-vocab", *load, "--vocab-size", "70", "--save", tmp_path / "wide")
    assert "with 70 tokens (was 53), padded to 80 (was 64); 17 new rows, 0 of them spelled" in summary
    taken = edit("weights-only", *load, "--save", tmp_path / "moe")
    assert (taken.returncode, taken.stdout) == (2, "")
    assert_errors(taken.stderr, (f"{tmp_path / 'moe' / 'release'}:", "must not exist yet"))
    assert edit_well("weights-only", *load, "--save", tmp_path / "moe", "--overwrite")
    wrong = edit("average", tmp_path / "run", tmp_path / "wide", "--weights", "1;2", "--save", tmp_path / "mean")
    assert wrong.returncode == 2
    assert_errors(wrong.stderr, ("weights:", "numbers with commas", "got 1;2", "--weights 0.5,0.3,0.2"))
