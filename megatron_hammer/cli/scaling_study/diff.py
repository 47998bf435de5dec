"""The difference of two studies: inputs, layouts that appeared or vanished and why, and how the best ones moved.

Reads two projection.json of `project`. The exit code is 0 whether they differ or not.

  diff study-a/projection.json study-b/projection.json
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.cli.scaling_study.result_files import describe_place, write_results
from megatron_hammer.scaling.decisions.study_diff import compare_studies
from megatron_hammer.scaling.decisions.study_diff_report import (
    build_document,
    build_tables,
    describe_difference,
    draw_curves,
    format_csv,
)
from megatron_hammer.scaling.report.projection_file import format_json
from megatron_hammer.scaling.report.projection_tables import print_table
from megatron_hammer.scaling.report.saved_study import read_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two files and the output."""
    parser.add_argument("first", type=Path, metavar="FIRST", help="projection.json that project wrote")
    parser.add_argument("second", type=Path, metavar="SECOND", help="another one")
    parser.add_argument("--output-dir", type=Path, help="writes diff.json, diff.csv and diff.png there")
    parser.add_argument("--json", action="store_true", help="the difference as one JSON object on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Print what differs. Raises ConfigError for files of another kind or version."""
    result = compare_studies(read_study(arguments.first), read_study(arguments.second))
    document = format_json(build_document(result))
    if arguments.output_dir is not None:
        files = {"diff.json": document, "diff.csv": format_csv(result)}
        write_results(arguments.output_dir, {**files, "diff.png": draw_curves(result)})
    if arguments.json:
        print(document, end="")
    else:
        for sentence in describe_difference(result):
            print(sentence)
        for table in build_tables(result):
            print()
            print_table(table, sys.stdout)
        print()
    print(
        f"{len(result.inputs)} inputs differ; {len(result.pairs)} layouts in both, {len(result.vanished)} vanished, "
        f"{len(result.appeared)} appeared{describe_place(arguments.output_dir)}",
        file=sys.stderr if arguments.json else sys.stdout,
    )
