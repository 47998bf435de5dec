"""The shipped coefficients and the accuracy that README states can be reproduced from the tables in this repository."""

import re

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, flatten_coefficients, load_coefficients
from megatron_hammer.scaling.evidence.calibration import fit, select_fit_runs
from megatron_hammer.scaling.evidence.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.evidence.run_table import PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH
from megatron_hammer.scaling.evidence.validation import cross_validate_runs
from tests.helpers.imports import ROOT


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


@pytest.mark.parametrize("readme", ["README.md", "README_zh-CN.md"])
def test_the_accuracy_in_the_readme(readme: str, cross_validated: dict[str, str]) -> None:
    """Number of runs, median error, mean error, share in the band: the figures of the row about published runs."""
    (row,) = re.findall(r"^\| [^|]*\b267\b.*$", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
    described, figures = row.split("|")[1:3]
    assert cross_validated["runs"] in re.findall(r"\d+", described)
    assert re.findall(r"[\d.]+%", figures)[:3] == [cross_validated[name] for name in ("median", "mean", "in band")]


@pytest.fixture(scope="module")
def cross_validated() -> dict[str, str]:
    runs, unpredictable = read_runs(PUBLISHED_RUNS_PATH)
    report = cross_validate_runs(runs, unpredictable, announce=lambda line: None)
    figures = report.errors["software"]["Megatron-style"]
    return {
        "runs": str(figures.num_rows),
        "median": f"{figures.median_absolute_ratio:.1%}",
        "mean": f"{figures.mean_absolute_ratio:.1%}",
        "in band": f"{figures.band_coverage_ratio:.0%}",
    }
