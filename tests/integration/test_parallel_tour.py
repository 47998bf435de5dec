"""The parallel tour as a user runs it, on two layouts; its tool on runs that agree, differ or are missing."""

import json
from pathlib import Path

import pytest

from tests.helpers.tool_runs import Finished, run_example, run_tool

pytestmark = pytest.mark.integration


def run_tour(output_dir: Path, *flags: str, **variables: str) -> Finished:
    return run_example("parallel_tour_cpu.sh", *flags, OUTPUT_DIR=output_dir, CORPUS_BYTES="1500000", **variables)


def compare(*arguments: str) -> Finished:
    return run_tool("tools/compare_runs.py", *arguments)


def write_metrics(path: Path, *losses: float) -> str:
    lines = (json.dumps({"step": step, "loss": loss, "grad_norm": 1.0}) for step, loss in enumerate(losses, 1))
    path.write_text("\n".join(lines), encoding="utf8")
    return f"{path.stem}={path}"


def test_tour_of_two_layouts(tmp_path: Path) -> None:
    result = run_tour(tmp_path, "--seq-length", "64", STEPS="4", LAYOUTS="single tp2")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-1].startswith("compared: 1 run with single, all within tolerance; ")
    metrics = [json.loads(line) for line in (tmp_path / "tp2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[0]["step_tokens"] == 8 * 64, "flags given to the tour must reach every run"
    # Four steps: how much the first one gains depends on the text of this machine (0.05 to 0.2).
    assert metrics[3]["loss"] < metrics[0]["loss"] - 0.2, "each step must start from weights that were updated"


def test_tour_refuses_an_unknown_layout(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in (
        "corpus.jsonl",
        "valid.jsonl",
        "tokenizer.model",
        "train_text_document.idx",
        "valid_text_document.idx",
    ):
        (tmp_path / "data" / name).write_text("kept as it is")
    result = run_tour(tmp_path, LAYOUTS="tp3")
    assert result.returncode == 2
    assert "LAYOUTS: must name layouts of this script, got tp3." in result.stderr


def test_exit_codes_of_the_comparison(tmp_path: Path) -> None:
    same, also = write_metrics(tmp_path / "a", 8.0, 7.0), write_metrics(tmp_path / "b", 8.0, 7.0)
    strayed = write_metrics(tmp_path / "c", 8.0, 7.01)
    assert compare("--runs", same, also).returncode == 0
    result = compare("--runs", same, also, strayed, "--json")
    assert result.returncode == 1
    assert [run["difference"] and run["difference"]["is_within"] for run in json.loads(result.stdout)] == [
        None,
        True,
        False,
    ]
    assert compare("--runs", same, strayed, "--tolerance", "0.01").returncode == 0


@pytest.mark.parametrize(
    "runs, message",
    [
        (("a=missing.jsonl",), "error: missing.jsonl: must be a metrics.jsonl, got no such file."),
        (("a.jsonl",), "error: --runs: each must be NAME=PATH, got 'a.jsonl'."),
        (("a=x", "--tolerance", "-1e-3"), "error: command line: --tolerance must be at least 0, got -0.001."),
        (("a=x", "a=y"), "error: --runs: names must differ, got a, a."),
    ],
)
def test_user_errors_of_the_comparison(runs: tuple[str, ...], message: str) -> None:
    result = compare("--runs", *runs)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr
