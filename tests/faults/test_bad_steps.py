"""A loss or gradient that is not finite, or a loss that spikes, never reaches the weights: --on-bad-loss.

Two data-parallel ranks of a real run; the loss of one batch is spoiled on the second. A batch is 8 samples.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.training.fingerprints import FOLDER, read_run
from tests.helpers.repository import ROOT
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, run_program, write_toy_data

pytestmark = pytest.mark.distributed
PROGRAM = ROOT / "tests" / "helpers" / "bad_batch.py"
BAD_STEP = 6
FILE = "skipped_batches.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_toy_data(tmp_path_factory.mktemp("data") / "corpus", num_documents=120)


def run(data: str, save: Path, *flags: str, factor: str = "nan", step: int = BAD_STEP, **variables: str) -> Any:
    own = (*TOY_MODEL, *TOY_SCHEDULE, "--data-path", data, "--save", str(save), "--train-iters", "9")
    variables |= {"FACTOR": factor, "BAD_SAMPLES": str(8 * (step - 1))}
    return run_program(PROGRAM, 2, *own, "--save-interval", "4", *flags, **variables)


def read_steps(save: Path) -> dict[int, dict[str, Any]]:
    def refuse(name: str) -> float:
        raise AssertionError(f"not JSON: {name}")

    lines = (save / "metrics.jsonl").read_text().splitlines()
    steps = (json.loads(text, parse_constant=refuse) for text in lines)
    return {line["step"]: line for line in steps if "loss" in line}


def read_skipped_steps(save: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (save / FILE).read_text().splitlines()]


def assert_named(result: subprocess.CompletedProcess[str], what: str) -> None:
    output = result.stdout + result.stderr
    assert f"step {BAD_STEP}: loss and gradient must be usable, got rank 1 (" in output, output[-2000:]
    assert what in output
    assert "Traceback" not in output


def test_stop_saves_the_last_good_weights_and_the_run_continues_after_a_fault_of_the_host(
    data: str, tmp_path: Path
) -> None:
    stopped = run(data, tmp_path, TIMES="1")
    assert stopped.returncode == 2
    assert_named(stopped, "loss is nan and norm of its gradients is nan")
    assert (tmp_path / "iter_0000005").is_dir()
    assert not (tmp_path / FILE).exists()
    again = run(data, tmp_path, TIMES="1")
    assert again.returncode == 0, again.stderr[-2000:]
    assert sorted(read_steps(tmp_path)) == list(range(1, 10))


def test_a_rolled_back_run_ends_like_one_that_skips_the_batch(data: str, tmp_path: Path) -> None:
    skipping, rolled_back = tmp_path / "skip", tmp_path / "back"
    # Its fingerprints look at every update as the judge does, and must not take its place.
    result = run(data, skipping, "--on-bad-loss", "skip-batch", "--fingerprint-interval", "1", factor="inf")
    assert result.returncode == 0, result.stderr[-2000:]
    assert_named(result, "The batch is skipped")
    result = run(data, rolled_back, "--on-bad-loss", "roll-back", factor="inf")
    assert result.returncode == 1
    assert_named(result, "starts again from its newest checkpoint, and leaves out the batches of steps 6 to 6")
    assert not (rolled_back / "iter_0000005").exists()
    result = run(data, rolled_back, "--on-bad-loss", "roll-back", factor="inf")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resumed from the checkpoint of step 4" in result.stdout
    assert "step 6: the batch is skipped, as before: rank 1 (" in result.stdout
    for folder in (skipping, rolled_back):
        assert read_skipped_steps(folder) == [BAD_STEP]
    steps, others = read_steps(skipping), read_steps(rolled_back)
    assert [step for step, line in steps.items() if line["is_skipped"]] == [BAD_STEP]
    assert steps[BAD_STEP]["loss"] is None
    fingerprints = read_run(skipping / FOLDER)[1]
    assert fingerprints[BAD_STEP].weights == fingerprints[BAD_STEP - 1].weights != fingerprints[BAD_STEP + 1].weights
    assert fingerprints[BAD_STEP].gradients
    # An average of the two ranks' gradients, of which one is infinite, would have left no finite loss.
    assert [steps[step]["loss"] for step in range(1, 10)] == [others[step]["loss"] for step in range(1, 10)]
    assert steps[9]["loss"] < steps[1]["loss"]


def test_a_spike_is_skipped(data: str, tmp_path: Path) -> None:
    flags = ("--on-bad-loss", "skip-batch", "--loss-spike-factor", "2", "--train-iters", "20")
    result = run(data, tmp_path, *flags, factor="5", step=19)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "is above 2 times" in result.stdout
    assert read_skipped_steps(tmp_path) == [19]


def test_without_the_check_the_metrics_stay_json(data: str, tmp_path: Path) -> None:
    result = run(data, tmp_path, "--no-check-for-nan-in-loss-and-grad")
    assert result.returncode == 0, result.stderr[-2000:]
    steps = read_steps(tmp_path)
    assert steps[9]["loss"] is None
    assert "step 6: loss is not a number" in result.stdout
