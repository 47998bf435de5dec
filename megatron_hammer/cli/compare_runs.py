"""Compare the losses of several runs of one model, step by step. Exit code 1: a run differs by more than the tolerance.

hammer compare-runs --runs single=a/metrics.jsonl tp2=b/metrics.jsonl
hammer compare-runs --bit-exact --runs first=a/metrics.jsonl again=b/metrics.jsonl

With --bit-exact, the runs must have one layout and have been trained with --fingerprint-interval; the first step, rank
and tensor that differ are named.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser
from megatron_hammer.files.tables import open_console
from megatron_hammer.training import compare, fingerprints

# Not 2, which is for errors of the user: here the comparison itself worked.
STRAYED_EXIT_CODE = 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; see --help."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--runs",
        nargs="+",
        # One list per model: each group is compared with its own first run.
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="metrics.jsonl of the runs of one model, the reference first; repeat --runs for another model",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=compare.TOLERANCE,
        help="largest relative difference of a step's loss (%(default)s)",
    )
    parser.add_argument(
        "--first-step-tolerance",
        type=float,
        default=compare.FIRST_STEP_TOLERANCE,
        help="the same for the first step (%(default)s)",
    )
    parser.add_argument(
        "--bit-exact", action="store_true", help="compare the fingerprints beside the metrics, which must be equal"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array with one object per run")
    arguments = parser.parse_args(argv)
    for flag in ("tolerance", "first-step-tolerance"):
        ratio = getattr(arguments, flag.replace("-", "_"))
        if ratio < 0:
            parser.error(f"--{flag} must be at least 0, got {ratio}")
    return arguments


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see --help. Exits with 1 if a run differs by more than the tolerance."""
    arguments = parse_arguments(argv)
    named_paths = [[compare.parse_named_path(text) for text in group] for group in arguments.runs]
    # Over all groups: the table and the JSON name a run by its name alone.
    names = [name for group in named_paths for name, _ in group]
    if len(set(names)) < len(names):
        raise ConfigError(f"--runs: names must differ, got {', '.join(names)}. Rename one.")
    if arguments.bit_exact and arguments.json:
        raise ConfigError("--json: has no effect with --bit-exact, whose answer is the exit code. Drop one of them.")
    groups = [[compare.read_run(name, path) for name, path in group] for group in named_paths]
    differences = [
        compare.compare_to_first(
            group, tolerance=arguments.tolerance, first_step_tolerance=arguments.first_step_tolerance
        )
        for group in groups
    ]
    if arguments.bit_exact:
        sys.exit(STRAYED_EXIT_CODE if print_first_differences(named_paths) else 0)
    if arguments.json:
        print(json.dumps(compare.as_objects(groups, differences), indent=2))
    else:
        compare.print_comparison(groups, differences, open_console())
    # After the tables: they show where a run that is beyond the tolerance begins to differ.
    if not all(difference.is_within for difference in itertools.chain(*differences)):
        sys.exit(STRAYED_EXIT_CODE)


def print_first_differences(named_paths: Sequence[Sequence[tuple[str, Path]]]) -> bool:
    """A line for each run after the first of its group; returns whether any differs."""
    is_any_different = False
    for (reference, reference_path), *others in named_paths:
        expected = fingerprints.read_run(reference_path.parent / fingerprints.FOLDER)
        for name, path in others:
            run = fingerprints.read_run(path.parent / fingerprints.FOLDER)
            difference = fingerprints.find_first_difference(run, expected)
            is_any_different |= difference is not None
            steps = sorted({step for of_rank in run.values() for step in of_rank})
            equal = f"equals it bit for bit in {len(steps)} steps of {len(run)} ranks"
            print(f"{name}, compared with {reference}: {difference or equal}")
    return is_any_different
