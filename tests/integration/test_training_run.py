"""What one training run leaves behind: metrics, named validation sets, TensorBoard, a curve, a log, a summary."""

import math
from pathlib import Path

import pytest

from tests.helpers.training_runs import TOY_MODEL, read_lines, run, train, write_toy_data

pytestmark = pytest.mark.integration
NUM_STEPS = 6
SCHEDULE = ("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3", "--min-lr", "1e-4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with everything a TP2 run wrote, and its standard output."""
    save = tmp_path_factory.mktemp("run")
    train_data = write_toy_data(save / "train")
    held_out, other = (
        write_toy_data(save / "held", num_documents=20, seed=6),
        write_toy_data(save / "other", num_documents=20, seed=7),
    )
    sets = ("--multiple-validation-sets", "--validation-set-names", "held-out", "other")
    result = run(
        2,
        *(*TOY_MODEL, *SCHEDULE, "--train-iters", str(NUM_STEPS), "--lr-warmup-iters", "2", "--eval-interval", "3"),
        *("--tensor-model-parallel-size", "2", "--train-data-path", train_data, "--valid-data-path", held_out, other),
        *(*sets, "--save", str(save), "--tensorboard-dir", str(save / "tensorboard"), "--peak-tflops", "0.5"),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return save, result.stdout


def test_one_object_a_step(finished: tuple[Path, str]) -> None:
    lines = read_lines(finished[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    last = lines[-1]
    assert (last["num_tokens"], last["step_tokens"]) == (NUM_STEPS * 8 * 64, 8 * 64)
    assert last["tokens_per_s"] == pytest.approx(last["step_tokens"] / last["step_time_s"])
    assert last["tokens_per_s_per_gpu"] == pytest.approx(last["tokens_per_s"] / 2)
    assert last["mfu"] == pytest.approx(last["model_tflops_per_gpu"] / 0.5)
    assert (last["mfu_convention"], last["peak_tflops"]) == ("A", 0.5)
    assert last["peak_memory_bytes"] > 2**27
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


def test_learning_rate_is_the_one_applied(finished: tuple[Path, str]) -> None:
    """Linear warm-up from 0 over 2 steps, then a cosine from 1e-3 that would reach 1e-4 after the last step."""
    rates = [line["lr"] for line in read_lines(finished[0] / "metrics.jsonl")]
    cosine = [
        1e-4 + 0.9e-3 * (1 + math.cos(math.pi * (step - 2) / (NUM_STEPS - 2))) / 2 for step in range(2, NUM_STEPS)
    ]
    assert rates == pytest.approx([0.0, 0.5e-3, *cosine])


def test_each_validation_set_once_an_evaluation(finished: tuple[Path, str]) -> None:
    lines = read_lines(finished[0] / "validation.jsonl")
    assert [(line["step"], line["validation_set"]) for line in lines] == [
        (3, "held-out"),
        (3, "other"),
        (6, "held-out"),
        (6, "other"),
    ]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in lines)
    assert lines[0]["loss"] != lines[1]["loss"]


def test_the_files_of_a_run(finished: tuple[Path, str]) -> None:
    save, stdout = finished
    assert (save / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(NUM_STEPS)
    assert list((save / "tensorboard").glob("events.out.tfevents.*"))
    assert "iteration        6/       6" in (save / "logs" / "rank-1.log").read_text()
    assert "torch backend, float32" in stdout
    assert "held-out at step 6" in stdout
    assert "iteration        6/" not in stdout  # megatron's own output stays in the log


def test_whole_validation_passes_agree_at_every_layout(tmp_path: Path) -> None:
    """One set, read to its end: by one process, where a tensor-parallel rank reads no data, and through four stages.

    The first run saves the weights that the others load; at a rate of 0 none of them changes these.
    """
    data = ("--train-data-path", write_toy_data(tmp_path / "train"))
    held_out = ("--valid-data-path", write_toy_data(tmp_path / "held", num_documents=9, seed=6), "--full-validation")
    layouts = {
        "tp2": (2, ("--tensor-model-parallel-size", "2")),
        "pp4": (4, ("--pipeline-model-parallel-size", "4")),
        "pp2-vp2": (2, ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")),
    }
    rate = ("--lr-warmup-iters", "0", "--lr", "0", "--min-lr", "0")
    shared = (*TOY_MODEL, *SCHEDULE, *data, *held_out, *rate, "--train-iters", "2", "--eval-interval", "2")
    runs = {"single": (1, ("--save", str(tmp_path / "single")))}
    runs |= {
        name: (num_processes, (*flags, "--load", str(tmp_path / "single"), "--finetune"))
        for name, (num_processes, flags) in layouts.items()
    }
    losses = {}
    for name, (num_processes, flags) in runs.items():
        folder = tmp_path / name
        train(num_processes, folder / "metrics.jsonl", *shared, *flags)
        (line,) = read_lines(folder / "validation.jsonl")
        assert (line["step"], line["validation_set"]) == (2, "validation")
        losses[name] = line["loss"]
    assert all(loss == pytest.approx(losses["single"], rel=1e-5) for loss in losses.values()), losses
