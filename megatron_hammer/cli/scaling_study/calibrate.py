"""The performance model's coefficients, fitted to measured runs.

Reads tables with the columns of the published runs: runs.csv of `measure`, your own, or published ones. Coefficients
are held close to the values they start from, so a few runs change only what they contain information about. The errors
are cross-validated: each publication (each run, if there is only one) is predicted with coefficients fitted without it.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_hammer.errors import DataError
from megatron_hammer.files.command_line import parse_new_name
from megatron_hammer.files.publish import require_results
from megatron_hammer.files.tables import build_table, open_console
from megatron_hammer.scaling.cost.coefficients import (
    MARK,
    Coefficients,
    build_prior_coefficients,
    flatten_coefficients,
    load_coefficients,
    save_coefficients,
)
from megatron_hammer.scaling.evidence.calibration import select_fit_runs
from megatron_hammer.scaling.evidence.cross_validation import Assessment, assess, calibrate, cross_validate
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tables of runs, where the fit starts, and where its coefficients go."""
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH, PUBLISHED_MOE_PATH],
        metavar="FILE",
        help="tables of measured runs (default: the published ones that the shipped coefficients were fitted on)",
    )
    parser.add_argument(
        "--output", type=parse_new_name, required=True, metavar="FILE", help="coefficients file to be written"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--start", type=Path, metavar="FILE", help="coefficients to start from (default: the shipped)")
    start.add_argument(
        "--from-priors", action="store_true", help="start without any earlier run, as the shipped ones did"
    )
    parser.add_argument("--gpus-file", type=Path, help="TOML of GPUs that changes or extends the shipped ones")
    parser.add_argument("--clusters-file", type=Path, help="TOML of clusters that changes or extends the shipped ones")
    parser.add_argument("--json", action="store_true", help="coefficients and errors as JSON on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Write the fitted coefficients and print them with their errors. Rows left out and the summary go to stderr."""
    require_results([arguments.output], mark=MARK)  # before the fits, which take minutes
    runs, left_out = read_calibration_runs(arguments)
    start = build_prior_coefficients() if arguments.from_priors else load_coefficients(arguments.start)
    # Runs that are alike would only repeat the same evidence.
    fitted = select_fit_runs(runs)
    # Progress first: the cross-validation below fits once per publication and takes the longest.
    print(f"fitting to {len(fitted)} of {len(runs)} runs", file=sys.stderr, flush=True)
    # The quoted errors come from fits that did not see the predicted run; the saved coefficients use all runs.
    predictions = cross_validate(fitted, start, is_prior_start=not arguments.from_priors)
    assessment = assess(predictions)
    coefficients = calibrate(fitted, start, assessment, is_prior_start=not arguments.from_priors)
    save_coefficients(coefficients, arguments.output)
    if arguments.json:
        print(json.dumps(build_calibration_document(start, coefficients, assessment), indent=2))
    else:
        print_tables(start, coefficients, assessment)
    errors = assessment.errors
    print(
        f"calibrate: {len(fitted)} runs fitted, {len(runs) - len(fitted)} alike not needed, {left_out} left out; "
        f"cross-validated error median {errors.median_ratio:.1%}, mean {errors.mean_ratio:.1%}; "
        f"wrote {arguments.output}",
        file=sys.stderr,
    )


def read_calibration_runs(arguments: argparse.Namespace) -> tuple[list[MeasuredRun], int]:
    """The Megatron-style runs of all files, and the number of all other rows, which are named on stderr."""
    runs: list[MeasuredRun] = []
    left_out = 0
    for path in arguments.runs:
        found, unpredictable = read_runs(path, gpus_path=arguments.gpus_file, clusters_path=arguments.clusters_file)
        runs += found
        left_out += len(unpredictable)
        for run in found:
            for sentence in run.contradictions:
                print(
                    f"{path}:{run.row_number}: contradiction ({run.source}): {sentence}",
                    file=sys.stderr,
                )
        for row in unpredictable:
            print(f"{path}:{row.row_number}: left out ({row.source}): {row.reason}", file=sys.stderr)
    chosen = [one for one in runs if one.is_megatron_style]
    # By source and not by row: a publication has many runs of one system.
    others = {one.source for one in runs if not one.is_megatron_style}
    if others:
        print(f"left out, other training systems than Megatron: {', '.join(sorted(others))}", file=sys.stderr)
    if not chosen:
        files = ", ".join(str(path) for path in arguments.runs)
        raise DataError(f"{files}: must hold a run that can be predicted, got none. See the reasons above.")
    return chosen, left_out + len(runs) - len(chosen)


def build_calibration_document(
    start: Coefficients, coefficients: Coefficients, assessment: Assessment
) -> dict[str, object]:
    """For --json: every coefficient before and after, the cross-validated errors and the bands."""
    before, after = flatten_coefficients(start), flatten_coefficients(coefficients)
    return {
        "coefficients": {name: {"before": before[name], "after": after[name]} for name in after},
        "cross_validated": assessment.build_table(),
        "band_ratio": dict(coefficients.band_ratio),
    }


def print_tables(start: Coefficients, coefficients: Coefficients, assessment: Assessment) -> None:
    """Print changed coefficients, errors by publication and the ranking. Changes below four digits are not shown."""
    before, after = flatten_coefficients(start), flatten_coefficients(coefficients)
    changed = [name for name in after if f"{before[name]:.4g}" != f"{after[name]:.4g}"]
    console = open_console()
    rows = [(name, f"{before[name]:.4g}", f"{after[name]:.4g}") for name in changed]
    console.print(build_table("Coefficients", ("coefficient", "before", "after"), rows))
    console.print(f"{len(after) - len(changed)} others stay as they were", "")
    figures = [
        (name, str(one.num_runs), f"{one.median_ratio:.1%}", f"{one.mean_ratio:.1%}", f"{one.bias_ratio:+.1%}")
        for name, one in [*assessment.by_publication.items(), ("all", assessment.errors)]
    ]
    console.print(build_table("Cross-validated", ("publication", "runs", "median", "mean", "bias"), figures))
    ranking = assessment.ranking
    if ranking is not None:
        print(
            f"layouts: the predicted best is within 5% of the measured best in {ranking.num_within_5_percent} of "
            f"{ranking.num_groups} groups of runs that differ only in layout"
        )
