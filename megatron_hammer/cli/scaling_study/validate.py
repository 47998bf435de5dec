"""Compare predictions with measured runs: errors by source, GPU, precision and scale, and the ranking of layouts.

Reads the published runs that come with this package, or any CSV with their columns (blanks allowed), such as the one
that `measure` writes. A row that cannot be predicted is listed with the reason. No accuracy is quoted on rows that the
coefficients were fitted on.

  validate --cross-validate
  validate --runs runs.csv --coefficients calibrated.toml --output-dir validation
  validate --memory
"""

import argparse
import json
import sys
from collections.abc import Sized
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hammer.cli.scaling_study.result_files import require_folder
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.evidence.folds import FOLDS_BY
from megatron_hammer.scaling.evidence.validation import ValidationReport, cross_validate_runs, validate_runs
from megatron_hammer.scaling.evidence.validation_report import (
    build_validation_document,
    draw_scatter,
    format_csv,
    print_report,
)
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MEMORY_PATH, PUBLISHED_RUNS_PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tables of runs and of memory figures, and the coefficients to compare them with."""
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="?",
        const=PUBLISHED_RUNS_PATH,
        metavar="FILE.csv",
        help="measured runs (default without --memory, and without FILE.csv: the published runs of this package)",
    )
    parser.add_argument(
        "--memory",
        type=Path,
        nargs="?",
        const=PUBLISHED_MEMORY_PATH,
        metavar="FILE.csv",
        help="measured memory (default without FILE.csv: the published figures of this package)",
    )
    parser.add_argument("--coefficients", type=Path, help="a file that calibrate wrote (default: the shipped one)")
    parser.add_argument("--gpus-file", type=Path, help="TOML of GPUs that changes or extends the shipped ones")
    parser.add_argument("--clusters-file", type=Path, help="TOML of clusters that changes or extends the shipped ones")
    parser.add_argument(
        "--cross-validate",
        choices=FOLDS_BY,
        nargs="?",
        const="recipe",
        help="predict every run with coefficients fitted without its publication and without the same model, GPU and "
        "kinds of parallelism elsewhere; with `publication`, these near copies stay in the fit; with `recipe-only`, "
        "other recipes of its publication do",
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    parser.add_argument(
        "--output-dir", type=Path, help="writes validation.json, validation.csv and validation.png there"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the errors of the predictions. Without --runs and --memory, the published runs are validated.

    Raises DataError, after everything is printed, for a table of which no row can be predicted.
    """
    if arguments.runs is None and arguments.memory is None:
        # Not argparse's default, with which --memory alone would validate the runs too.
        arguments.runs = PUBLISHED_RUNS_PATH
    _check_arguments(arguments)
    require_folder(arguments.output_dir, ("validation.json", "validation.csv", "validation.png"))
    report = None if arguments.runs is None else _validate(arguments)
    memory = None if arguments.memory is None else _validate_memory(arguments.memory)
    document: dict[str, Any] = {"format": "megatron_hammer.scaling.validation"}
    if report is not None:
        document |= build_validation_document(report)
    if memory is not None:
        document["memory"] = memory.as_json()
    if arguments.output_dir is not None:
        _write_files(arguments.output_dir, document, report)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        if memory is not None:
            from megatron_hammer.scaling.memory.validation import print_memory_report

            print_memory_report(memory, sys.stdout)
        if report is not None:
            print_report(report, sys.stdout)
    _require_predictions(arguments.runs, None if report is None else report.predictions)
    _require_predictions(arguments.memory, None if memory is None else memory.rows)


def _require_predictions(path: Path | None, predicted: Sized | None) -> None:
    """Raise DataError for a table of which nothing was validated, after its reasons are printed."""
    if predicted is not None and not predicted:
        raise DataError(f"{path}: must hold a row that can be predicted, got none. See the reasons above.")


def _check_arguments(arguments: argparse.Namespace) -> None:
    problems = []
    if arguments.cross_validate and arguments.runs is None:
        problems.append("cross-validate: needs runs, got --memory alone. Pass --runs as well, or drop --memory.")
    if arguments.cross_validate and arguments.coefficients is not None:
        problems.append(
            f"cross-validate: fits its own coefficients, got --coefficients {arguments.coefficients}. "
            "Drop one of the two."
        )
    if problems:
        raise ConfigError(*problems)


def _validate(arguments: argparse.Namespace) -> ValidationReport:
    runs, unpredictable = read_runs(
        arguments.runs, gpus_path=arguments.gpus_file, clusters_path=arguments.clusters_file
    )
    if arguments.cross_validate:
        # Progress goes to stderr, since each fold takes a fit of its own.
        announce = partial(print, file=sys.stderr, flush=True)
        return cross_validate_runs(runs, unpredictable, announce, by=arguments.cross_validate)
    return validate_runs(runs, unpredictable, load_coefficients(arguments.coefficients))


def _validate_memory(path: Path) -> Any:
    from megatron_hammer.scaling.memory.validation import validate_memory

    return validate_memory(path)


def _write_files(folder: Path, document: dict[str, Any], report: ValidationReport | None) -> None:
    files: dict[Path, str | bytes] = {folder / "validation.json": json.dumps(document, indent=2) + "\n"}
    if report is not None:
        files[folder / "validation.csv"] = format_csv(report)
        # None where no run could be predicted.
        scatter = draw_scatter(report)
        if scatter is not None:
            files[folder / "validation.png"] = scatter
    # All at once, after everything was drawn: a failure leaves no half of a result.
    publish_results(files)
    print(f"wrote {', '.join(path.name for path in files)} to {folder}", file=sys.stderr)
