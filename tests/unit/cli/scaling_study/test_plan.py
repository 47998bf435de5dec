"""The command: the decision first, JSON alone on stdout, and targets that cannot be meant."""

import json
from pathlib import Path

import pytest

from megatron_hammer.cli.scaling_study.main import main
from tests.helpers.simulated_losses import simulate_losses


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("losses") / "losses.csv"
    rows = [f"{run.num_parameters},{run.num_tokens},{run.loss}" for run in simulate_losses()]
    path.write_text("\n".join(["num_parameters,num_tokens,loss", *rows]) + "\n", encoding="utf-8")
    return path


def run(table: Path, *flags: str) -> None:
    machine = (
        "--gpu",
        "h100-sxm",
        "--gpus",
        "8",
        "--pipeline-model-parallel-size",
        "1",
        "--context-parallel-size",
        "1",
    )
    main(["plan", "--table", str(table), "--preset", "hammer-1b4", *machine, *flags])


def test_the_decision_comes_first(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--target-loss", "2.4", "--usd-per-gpu-hour", "2", "--deadline-days", "1000", "--budget-usd", "1e6")
    run(table, *flags, "--output-dir", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Train ")
    assert lines[1].startswith("Use 8 GPUs: ")
    assert "--save-interval " in lines[1]
    assert lines[-1] == "1 sizes, 1 with a layout that fits and makes progress"
    document = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert document["chosen_gpus"] == 8
    assert document["loss"] == pytest.approx(2.4)
    assert document["sizes"][0]["days_interval"][0] < document["sizes"][0]["days"]


def test_json_is_alone_on_stdout_and_an_unmet_limit_is_an_error(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(table, "--train-tokens", "100B", "--deadline-days", "0.1", "--json")
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert json.loads(output.out)["chosen_gpus"] is None
    assert output.err.startswith("error: deadline-days: must leave time for the run, got 0.1")


@pytest.mark.parametrize(
    "flags, text",
    [
        ((), "target-loss: exactly one of it and --train-tokens must be given, got neither"),
        (("--target-loss", "2", "--train-tokens", "1B"), "target-loss: exactly one of it and --train-tokens"),
        (("--target-loss", "-2"), "target-loss: must be above 0, got -2"),
        (("--target-loss", "2.4", "--budget-usd", "5", "--cluster", "dgx-h100"), "budget-usd: must come with a price"),
        (("--target-loss", "1.5"), "target-loss: must be above the floor E"),
        (("--train-tokens", "1", "--preset", "hammer-1b4"), "model: must "),
    ],
)
def test_targets_that_cannot_be_meant(
    table: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], text: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(table, *flags)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
