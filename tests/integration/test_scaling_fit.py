"""`scaling_study.py fit` as a user runs it: on a table, on the folders of trainings, and on what it must refuse."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.model.accounting import count_flops_per_token, count_parameters
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.messages import assert_errors
from tests.helpers.simulated_losses import TRUE_LAW, simulate_losses
from tests.helpers.tool_runs import Finished, run_tool, run_tool_here

pytestmark = pytest.mark.integration


def run_fit(*arguments: str) -> Finished:
    return run_tool_here("tools/scaling_study.py", "fit", *arguments)


def write_table(path: Path, *rows: tuple[object, ...]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "num_parameters", "num_tokens", "loss"))
        writer.writerows((run.name, run.num_parameters, run.num_tokens, run.loss) for run in simulate_losses())
        writer.writerows(rows)
    return path


def test_a_table_gives_the_law_the_plot_and_the_best_size(tmp_path: Path) -> None:
    table = write_table(tmp_path / "losses.csv", ("wild", 1e9, 1e10, "nan"))
    common = ("--table", str(table), "--leave-out", "wild", "--bootstrap-samples", "200")
    flags = (*common, "--budget-flops", "1e21", "--output-dir", str(tmp_path / "study"), "--json")
    result = run_tool("tools/scaling_study.py", "fit", *flags)
    assert result.returncode == 0, result.stderr
    study = json.loads(result.stdout)
    for name, (low, high) in study["law_intervals"].items():
        assert low <= getattr(TRUE_LAW, name) <= high
    assert json.loads((tmp_path / "study" / "loss_law.json").read_text()) == study
    assert (tmp_path / "study" / "loss_law.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["loss_law.json", "loss_law.png"]
    assert study["budgets"][0]["num_parameters"] == pytest.approx(2.5e9, rel=0.3)
    assert run_fit(*common).stdout.splitlines()[-1].startswith("fitted: 25 runs of 5 sizes and 25 numbers of tokens, ")


def test_trainings_are_read_from_their_folders(tmp_path: Path) -> None:
    specs = []
    for name in ("hammer-tiny", "tiny-llm-zh-16m", "tiny-llm-zh-42m"):
        for num_steps in (10, 30):
            folder = tmp_path / f"{name}-{num_steps}"
            write_training(folder, name, num_steps)
            vocabulary = "" if name == "hammer-tiny" else "@4096"
            specs.append(f"{name}{vocabulary}={folder}")
    result = run_fit("--runs", *specs, "--flop-convention", "A", "--bootstrap-samples", "100", "--json")
    # Six runs of two numbers of tokens determine nothing.
    assert (result.returncode, result.stdout) == (2, "")
    assert_errors(
        result.stderr, ("runs:", "at least 6 of at least 3 sizes", "got 6 runs of 3 sizes and 2 numbers of tokens")
    )
    result = run_fit("--runs", *specs, "--loss", "training", "--validation-set", "zh")
    assert result.returncode == 2
    assert_errors(result.stderr, ("validation-set:", "--loss training", "got zh"))
    write_training(tmp_path / "longest", "hammer-tiny", 90)
    specs.append(f"hammer-tiny={tmp_path / 'longest'}")
    result = run_fit("--runs", *specs, "--flop-convention", "A", "--bootstrap-samples", "100", "--json")
    assert result.returncode == 0, result.stderr
    study = json.loads(result.stdout)
    assert study["compute_convention"].startswith("convention A: layers and head, causal attention, no input embedding")
    assert [run["num_tokens"] for run in study["runs"]] == [81920, 245760, 81920, 245760, 81920, 245760, 737280]
    assert {run["loss_source"] for run in study["runs"]} == {f"loss of validation at step {n}" for n in (10, 30, 90)}
    # A plan reads the same runs.
    machine = ("--gpu", "cpu-core", "--gpus", "1", "--micro-batch-size", "1")
    flags = ("--preset", "hammer-tiny", "--keep-model", "--train-tokens", "1M", *machine, "--json")
    result = run_tool_here("tools/scaling_study.py", "plan", "--runs", *specs, *flags)
    assert result.returncode == 0, result.stderr
    law = study["law"]
    size, tokens = count_parameters(PRESETS["hammer-tiny"].model), 10**6
    loss = law["E"] + law["A"] / size ** law["alpha"] + law["B"] / tokens ** law["beta"]
    assert json.loads(result.stdout)["loss"] == pytest.approx(loss)


def write_training(folder: Path, preset: str, num_steps: int) -> None:
    """The files of a training of 32 sequences of 256 tokens per step; its vocabulary is 4096, its loss law is known."""
    model = replace(PRESETS[preset].model, vocab_size=4096)
    folder.mkdir()
    steps = []
    for step in range(1, num_steps + 1):
        tokens = 32 * 256 * step
        step_line = {"step": step, "num_samples": 32 * step, "num_tokens": tokens, "mfu_convention": "A"}
        step_line |= {"loss": TRUE_LAW.predict(5e6, tokens), "lr": 1e-3 if step < num_steps else 1e-4}
        step_line |= {"tokens_per_s_per_gpu": 100.0}
        step_line |= {"model_tflops_per_gpu": 100.0 * count_flops_per_token(model, 256, "A") / 1e12}
        steps.append(json.dumps(step_line))
    (folder / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    loss = TRUE_LAW.predict(count_parameters(model), 32 * 256 * num_steps)
    validation = {"step": num_steps, "validation_set": "validation", "loss": loss}
    (folder / "validation.jsonl").write_text(json.dumps(validation) + "\n")


TABLE_HAS_IT = ("must be left out with --table", "--runs")


@pytest.mark.parametrize(
    "arguments, problems",
    [
        ((), [("simulated.csv:27: run wild", "finite loss", "got nan", "--leave-out wild")]),
        (
            ("--confidence", "90", "--budget-flops", "-1", "--bootstrap-samples", "5"),
            [
                ("confidence:", "between 0 and 1", "got 90", "Pass 0.9"),
                ("bootstrap-samples:", "at least 100", "got 5"),
                ("budget-flops:", "positive and finite", "got -1"),
            ],
        ),
        (
            ("--budget-gpu-hours", "0", "10", "--projection-gpus", "8"),
            [
                ("projection-gpus:", "must come with --projection", "got 8 alone"),
                ("budget-gpu-hours:", "must come with --projection", "project --output-dir"),
                ("budget-gpu-hours:", "positive and finite", "got 0"),
            ],
        ),
        (
            ("--flop-convention", "A", "--loss", "training", "--validation-set", "zh"),
            [
                ("loss:", *TABLE_HAS_IT),
                ("validation-set:", *TABLE_HAS_IT),
                ("flop-convention:", *TABLE_HAS_IT),
            ],
        ),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused_and_leave_no_file(
    tmp_path: Path, arguments: tuple[str, ...], problems: list[tuple[str, ...]]
) -> None:
    table = write_table(tmp_path / "simulated.csv", ("wild", 1e9, 1e10, "nan"))
    result = run_fit("--table", str(table), "--output-dir", str(tmp_path / "study"), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert_errors(result.stderr.replace(f"{tmp_path}/", ""), *problems)
    assert not (tmp_path / "study").exists()
