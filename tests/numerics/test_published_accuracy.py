"""The shipped coefficients and the accuracy in README and docs are reproduced from the tables in this repository."""

import re
from collections.abc import Mapping

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, flatten_coefficients, load_coefficients
from megatron_hammer.scaling.evidence.calibration import fit, select_fit_runs
from megatron_hammer.scaling.evidence.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.evidence.run_table import PUBLISHED_MEMORY_PATH, PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH
from megatron_hammer.scaling.evidence.validation import (
    ErrorFigures,
    Prediction,
    ValidationReport,
    build_validation_report,
    cross_validate_runs,
)
from megatron_hammer.scaling.memory.validation import validate_memory
from tests.helpers.repository import ROOT


def read_fit_runs() -> list[MeasuredRun]:
    runs = [run for path in (PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH) for run in read_runs(path)[0]]
    return select_fit_runs([run for run in runs if run.is_megatron_style])


def test_the_shipped_coefficients_are_the_fit_to_the_shipped_tables() -> None:
    runs = read_fit_runs()
    shipped = load_coefficients()
    assert {run.fingerprint for run in runs} == set(shipped.provenance["fingerprints"])
    # The file has six digits; measured difference 2.4e-6.
    fitted = flatten_coefficients(fit(runs, build_prior_coefficients()))
    assert fitted == pytest.approx(flatten_coefficients(shipped), rel=1e-5)


def test_a_fit_to_half_of_the_runs_is_another() -> None:
    fitted = flatten_coefficients(fit(read_fit_runs()[::2], build_prior_coefficients()))
    assert fitted != pytest.approx(flatten_coefficients(load_coefficients()), rel=1e-3)


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    runs, unpredictable = read_runs(PUBLISHED_RUNS_PATH)
    return cross_validate_runs(runs, unpredictable, announce=lambda line: None)


def format_figures(figures: ErrorFigures) -> list[str]:
    return [
        str(figures.num_rows),
        f"{figures.median_absolute_ratio:.1%}",
        f"{figures.mean_absolute_ratio:.1%}",
        f"{figures.bias_ratio:+.1%}",
        f"{figures.band_coverage_ratio:.0%}",
    ]


@pytest.mark.parametrize("readme", ["README.md", "README_zh-CN.md"])
def test_the_accuracy_in_the_readme(readme: str, report: ValidationReport) -> None:
    """The row about published runs has their number, and the median and mean error."""
    num_rows, median, mean, *_ = format_figures(report.errors["software"]["Megatron-style"])
    (row,) = re.findall(rf"^\| [^|]*\b{num_rows}\b.*$", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"[\d.]+%", row.split("|")[2]) == [median, mean]


def read_tables(heading: str) -> list[list[str]]:
    """The rows of the table of docs/scaling_accuracy.md whose header begins with `heading`."""
    text = (ROOT / "docs" / "scaling_accuracy.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^\| {heading}.*\n\|[-: |]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_of_step_times_in_the_docs(report: ValidationReport) -> None:
    errors = {name: format_figures(figures) for name, figures in report.errors["source"].items()}
    sources = {name.replace("_", " "): figures for name, figures in errors.items()}
    first, *styles = read_tables("Megatron-core")
    assert first == ["all", *format_figures(report.errors["software"]["Megatron-style"])]
    megatron = build_report([one for one in report.predictions if one.run.is_megatron_style])
    named = {name: figures for group in ("GPU", "precision", "scale") for name, figures in megatron[group].items()}
    assert {name: figures for name, *figures in styles} == {
        name.replace("-", " to ") if name.endswith("GPUs") else name: format_figures(figures)
        for name, figures in named.items()
    }
    listed = [*read_tables("by source"), *read_tables("other software")[1:]]
    assert {name: figures for name, *figures in listed} == sources


def build_report(predictions: list[Prediction]) -> Mapping[str, Mapping[str, ErrorFigures]]:
    return build_validation_report(predictions, []).errors


def test_the_table_of_memory_in_the_docs() -> None:
    groups = [group for group in validate_memory(PUBLISHED_MEMORY_PATH).groups if group.by == "source"]
    expected = {
        group.name.replace("_", " "): [
            str(group.num_rows),
            f"{group.median_absolute_error_ratio:.1%}",
            f"{group.mean_absolute_error_ratio:.1%}",
            f"{group.largest_error_ratio:+.1%}",
            f"{group.within_5_percent_ratio:.0%}",
        ]
        for group in groups
    }
    assert {name: figures for name, *figures in read_tables("memory")} == expected
