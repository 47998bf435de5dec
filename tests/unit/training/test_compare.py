"""Comparing runs: exact ratios, which runs are beyond tolerance, and every message."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.training.compare import (
    Run,
    as_objects,
    compare_to_first,
    difference_ratio,
    parse_named_path,
    print_comparison,
    read_run,
    summarize,
)


def make_run(name: str, *losses: float, grad_norms: tuple[float | None, ...] | None = None) -> Run:
    steps = range(1, len(losses) + 1)
    norms = grad_norms or (1.0,) * len(losses)
    return Run(name=name, losses=dict(zip(steps, losses, strict=True)), grad_norms=dict(zip(steps, norms, strict=True)))


def write_metrics(path: Path, *losses: float) -> Path:
    lines = [json.dumps({"step": step, "loss": loss, "grad_norm": None}) for step, loss in enumerate(losses, 1)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8")
    return path


def test_largest_difference_and_its_step() -> None:
    reference = make_run("single", 8.0, 4.0, 2.0, grad_norms=(2.0, None, 4.0))
    run = make_run("tp2", 8.0, 4.0 + 2**-12, 2.0 - 2**-14, grad_norms=(2.0, 3.0, 5.0))
    (difference,) = compare_to_first([reference, run])
    assert difference.name == "tp2"
    assert difference.reference == "single"
    assert difference.first_step_ratio == 0.0
    assert (difference.max_loss_ratio, difference.max_loss_step) == (2**-14, 2)
    assert difference.max_grad_norm_ratio == 0.25
    assert difference.is_within


@pytest.mark.parametrize(
    "losses, is_within",
    [
        ((1.0, 1.0), True),
        ((1.0 + 0.9e-5, 1.0), True),
        ((1.0 + 1.1e-5, 1.0), False),  # the first step, on equal weights, is held to a tenth
        ((1.0, 1.0 - 0.9e-4), True),
        ((1.0, 1.0 - 1.1e-4), False),
        ((1.0, math.nan), False),
        ((math.nan, 1.0), False),
    ],
)
def test_runs_beyond_their_tolerance_are_found(losses: tuple[float, ...], is_within: bool) -> None:
    (difference,) = compare_to_first([make_run("single", 1.0, 1.0), make_run("pp2", *losses)])
    assert difference.is_within is is_within


def test_tolerances_are_the_callers() -> None:
    runs = [make_run("single", 1.0, 1.0), make_run("pp2", 1.01, 1.1)]
    assert compare_to_first(runs, tolerance=0.2, first_step_tolerance=0.02)[0].is_within
    assert not compare_to_first(runs, tolerance=0.05, first_step_tolerance=0.02)[0].is_within


def test_difference_ratio_of_odd_values() -> None:
    assert difference_ratio(0.0, 0.0) == 0.0
    assert difference_ratio(1.0, 0.0) == math.inf
    assert difference_ratio(math.nan, math.nan) == 0.0  # a step that both skipped
    assert difference_ratio(math.nan, 1.0) == math.inf
    assert difference_ratio(-1.0, -2.0) == 0.5


def test_runs_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"^tp2: must have the steps of single, got 1 steps from 1 to 1 instead of 2 "):
        compare_to_first([make_run("single", 1.0, 1.0), make_run("tp2", 1.0)])


def test_read_run(tmp_path: Path) -> None:
    run = read_run("dp2", write_metrics(tmp_path / "metrics.jsonl", 3.5, 3.25))
    assert run == make_run("dp2", 3.5, 3.25, grad_norms=(None, None))


def test_read_run_refuses_what_is_not_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match=r"metrics.jsonl: must be a metrics.jsonl, got no such file\. Check"):
        read_run("dp2", path)
    path.write_text("", encoding="utf8")
    with pytest.raises(DataError, match=r"metrics.jsonl: must hold at least one step, got none\. Run dp2 again"):
        read_run("dp2", path)
    repeated = '{"step": 1, "loss": 1.0, "grad_norm": 1.0}'
    for line in (repeated, '{"step": 2, "lo', '{"step": 2}', "[]", '{"step": 2, "loss": "x", "grad_norm": 1}'):
        write_metrics(path, 1.0)
        with path.open("a", encoding="utf8") as file:
            file.write(line)
        with pytest.raises(DataError, match=r"metrics.jsonl:2: must be one JSON object with a new step, loss"):
            read_run("dp2", path)


def test_parse_named_path() -> None:
    assert parse_named_path("tp2=a=b/metrics.jsonl") == ("tp2", Path("a=b/metrics.jsonl"))
    for text in ("metrics.jsonl", "=metrics.jsonl", "tp2="):
        with pytest.raises(ConfigError, match=r"--runs: each must be NAME=PATH, got '"):
            parse_named_path(text)


def test_table_and_summary() -> None:
    groups = [
        [make_run("single", 8.0, 7.0), make_run("tp2", 8.0, 7.0 * (1 + 2e-7)), make_run("pp2", 8.0, 7.0)],
        [make_run("moe", 6.0, 5.0), make_run("moe-ep2", 6.0, 5.5)],
    ]
    differences = [compare_to_first(group) for group in groups]
    stream = io.StringIO()
    print_comparison(groups, differences, Console(file=stream, width=100))
    rows = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert ["loss", "single", "tp2", "pp2"] in rows
    assert ["step", "2", "7.00000", "7.00000", "7.00000"] in rows
    assert ["differs", "2.0e-07", "0.0e+00"] in rows
    assert ["loss", "moe", "moe-ep2"] in rows
    assert stream.getvalue().splitlines()[-1] == (
        "compared: 3 runs with single and moe, 1 beyond tolerance (moe-ep2); "
        "the loss differs most in moe-ep2 at step 2, by 1.0e-01 of moe's"
    )


def test_summary_of_lone_and_agreeing_runs() -> None:
    assert summarize([]) == "compared: 0 runs, since each stands alone"
    summary = summarize(compare_to_first([make_run("single", 2.0), make_run("tp2", 2.0)]))
    assert summary.startswith("compared: 1 run with single, all within tolerance; ")


def test_objects() -> None:
    group = [make_run("single", 8.0), make_run("tp2", 8.0)]
    reference, run = as_objects([group], [compare_to_first(group)])
    assert reference == {"name": "single", "losses": [{"step": 1, "loss": 8.0}], "difference": None}
    assert run["difference"] == {
        "reference": "single",
        "first_step_ratio": 0.0,
        "max_loss_ratio": 0.0,
        "max_loss_step": 1,
        "max_grad_norm_ratio": 0.0,
        "is_within": True,
    }
