"""The shipped coefficients and the accuracy in README and docs are reproduced from the tables in this repository."""

import re
import sys
from pathlib import Path

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, flatten_coefficients, load_coefficients
from megatron_hammer.scaling.evidence.calibration import fit
from megatron_hammer.scaling.evidence.validation import (
    ValidationReport,
    build_validation_report,
    cross_validate_runs,
)
from megatron_hammer.scaling.memory.validation import validate_memory
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import (
    PUBLISHED_MEMORY_PATH,
    PUBLISHED_MOE_PATH,
    PUBLISHED_RUNS_PATH,
)
from tests.helpers.repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from scaling_accuracy import (
    COMMAND,
    DOCUMENT_PATH,
    EXPERTS_COMMAND,
    README_PATHS,
    build_documents,
    find_readme_rows,
    keep_date,
    read_fit_runs,
    replace_block,
)


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


@pytest.fixture(scope="module")
def experts() -> ValidationReport:
    return cross_validate_runs(*read_runs(PUBLISHED_MOE_PATH), announce=lambda line: None)


@pytest.fixture(scope="module")
def documents(report: ValidationReport, experts: ValidationReport) -> dict[Path, str]:
    """The documents as benchmarks/scaling_accuracy.py would write them, from the shipped coefficients."""
    return build_documents(report, experts, validate_memory(PUBLISHED_MEMORY_PATH), load_coefficients())


@pytest.mark.parametrize("path", [DOCUMENT_PATH, *README_PATHS], ids=lambda path: path.name)
def test_the_figures_in_the_documents(path: Path, documents: dict[Path, str]) -> None:
    """If this fails: python benchmarks/scaling_accuracy.py --write."""
    assert path.read_text(encoding="utf-8").splitlines() == documents[path].splitlines()


def test_the_figures_of_the_report_stand_in_the_documents(
    report: ValidationReport, experts: ValidationReport, documents: dict[Path, str]
) -> None:
    figures = report.errors["software"]["Megatron-style"]
    median, mean = f"{figures.median_absolute_ratio:.1%}", f"{figures.mean_absolute_ratio:.1%}"
    refused = report.refused["software"]["Megatron-style"]
    assert f"| **all** | {figures.num_rows} | {refused} | {median} | {mean} |" in documents[DOCUMENT_PATH]
    assert all(f"| {row.reason} |" in documents[DOCUMENT_PATH] for row in report.unpredictable)
    of_experts = experts.errors["software"]["Megatron-style"]
    for path in README_PATHS:
        for command, found in ((COMMAND, figures), (EXPERTS_COMMAND, of_experts)):
            (row,) = find_readme_rows(documents[path], command)
            errors = (found.median_absolute_ratio, found.mean_absolute_ratio)
            assert re.findall(r"[\d.]+%", row) == [f"{error:.1%}" for error in errors]
            assert str(found.num_rows) in row
    sources = {run.source.replace("_", " ") for run in (one.run for one in report.predictions)}
    assert {name for name in sources if f"\n| {name} | " in documents[DOCUMENT_PATH]} == sources


def test_another_report_changes_the_documents(
    report: ValidationReport, experts: ValidationReport, documents: dict[Path, str]
) -> None:
    fewer = build_validation_report(report.predictions[::2], report.unpredictable)
    others = build_documents(fewer, experts, validate_memory(PUBLISHED_MEMORY_PATH), load_coefficients())
    assert all(others[path] != text for path, text in documents.items())


def test_a_document_without_its_comments_is_named() -> None:
    with pytest.raises(SystemExit, match="end of memory"):
        replace_block("<!-- memory: written by benchmarks/scaling_accuracy.py -->\n", "memory", "")


def test_a_fit_that_changes_nothing_keeps_its_date() -> None:
    older = 'a = 1\ndate = "2026-11-21"\n'
    assert keep_date(older.replace("21", "29"), older) == older
    assert keep_date(older.replace("a = 1", "a = 2"), older) == older.replace("a = 1", "a = 2")
