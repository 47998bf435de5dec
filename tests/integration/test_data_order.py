"""A run is extended across an epoch, with real training and real checkpoints: when preflight refuses it."""

import shutil
from pathlib import Path

import pytest

from megatron_hammer.config import saved_run
from tests.helpers.parsed_flags import find, parse
from tests.helpers.training_runs import TOY_MODEL, TOY_SCHEDULE, read_lines, run, train, write_toy_data

pytestmark = pytest.mark.integration
SHORT, LONG = 6, 12  # steps of 8 samples; an epoch has some 60
EPOCHWISE = ("--data-order", "epochwise")
LONGER = ("--train-iters", str(LONG), "--override-opt-param-scheduler")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The learning rate falls over the long run in both, so that only the data can tell them apart.

    The short run is evaluated at every step, the long one at every third: more often than that would have been until
    then.
    """
    data = write_toy_data(tmp_path_factory.mktemp("data") / "data", num_documents=27)
    schedule = (*TOY_SCHEDULE, "--lr-decay-iters", str(LONG), "--eval-iters", "1")
    return (*TOY_MODEL, *schedule, "--split", "80,20,0", "--data-path", "1", data)


@pytest.fixture(scope="module")
def short_run(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of six steps in megatron's order."""
    save = tmp_path_factory.mktemp("short")
    train(1, save / "metrics.jsonl", *flags, "--train-iters", str(SHORT), "--save", str(save))
    return save


@pytest.fixture
def resumed(short_run: Path, tmp_path: Path) -> Path:
    """A copy to go on in."""
    saved_run.open_saved_run.cache_clear()
    shutil.copytree(short_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_epochwise_order_continues_as_without_an_interruption(
    flags: tuple[str, ...], resumed: Path, tmp_path: Path
) -> None:
    whole = train(1, tmp_path / "whole.jsonl", *flags, *EPOCHWISE, "--train-iters", str(LONG))
    result = run(1, *flags, *EPOCHWISE, *LONGER, "--save", str(resumed))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "data order: as in the checkpoint" in result.stdout
    extended = read_lines(resumed / "metrics.jsonl")
    assert [line["step"] for line in extended] == list(range(1, LONG + 1))
    for name in ("loss", "grad_norm", "lr", "num_samples"):
        assert [line[name] for line in extended] == [line[name] for line in whole], name


def test_megatrons_order_continues_only_with_the_flag(flags: tuple[str, ...], resumed: Path) -> None:
    resume = (*flags, *LONGER, "--save", str(resumed))
    result = run(1, *resume)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (source,) = parse(*flags).settings.data.sources.shared
    where = resumed / f"iter_{SHORT:07d}"
    assert (
        f"error: data-order: must be that of the checkpoint, got samples=96 (was 48); {source.prefix} with 2 epochs "
        f"shuffled "
        f"together, the last apart (was one epoch) (in {where}). Of the 48 samples (3,072 tokens) trained on so far, "
    ) in result.stderr
    assert len(read_lines(resumed / "metrics.jsonl")) == SHORT, "nothing was trained"
    result = run(1, *resume, "--accept-data-order-change")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "data order: changed after sample 48, as accepted" in result.stdout
    starts = [part["first_sample"] for part in read_record(resumed, LONG)["segments"]]
    assert starts == [0, 48]


def read_record(folder: Path, step: int) -> dict:
    """As preflight reads it, from the checkpoint alone."""
    saved_run.open_saved_run.cache_clear()
    return saved_run.read_saved_run(folder / f"iter_{step:07d}").record


def test_a_checkpoint_names_its_data(flags: tuple[str, ...], short_run: Path) -> None:
    """Without starting a process: what the guard says of a real checkpoint."""
    (segment,) = read_record(short_run, SHORT)["segments"]
    (source,) = segment["order"]["sources"]
    assert (segment["first_sample"], segment["order"]["num_samples"]) == (0, 48)
    assert source["identity"]["num_documents"] == 27
    assert source["identity"]["fingerprint"]
    resume = (*flags, "--train-iters", str(SHORT), "--load", str(short_run))
    assert find(*resume) == []
    assert "got seed=7 (was 1234) (in" in find(*resume, "--seed", "7")[0]
    (problem,) = find(*flags, "--train-iters", str(LONG), *EPOCHWISE, "--load", str(short_run))
    assert problem.startswith(
        "override-opt-param-scheduler: the schedule must be that of the checkpoint, got samples=96"
    )
