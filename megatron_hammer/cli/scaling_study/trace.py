"""A Chrome trace of a predicted step: every pass of every pipeline stage, its parts, waits and communication.

Reads projection.json of `project`, and draws the step of one row as the cost model added it up. Open the file in
https://ui.perfetto.dev or chrome://tracing.

  trace --projection study/projection.json --row 64-1 --output step.json
"""

import argparse
import math
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.files.tables import build_table, open_console, print_json
from megatron_hammer.scaling.report.projection_file import SavedRow, read_projection
from megatron_hammer.scaling.search.projection import describe_plan
from megatron_hammer.scaling.timeline.trace import FORMAT, StepTrace, build_trace, format_trace, sum_slowest_stage

# Of the time in the file, to the one that is predicted again: only rounding may differ.
TIME_TOLERANCE_RATIO = 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which row of which projection, and how much of it is drawn."""
    parser.add_argument("--projection", type=Path, required=True, help="projection.json that project wrote")
    parser.add_argument("--row", required=True, help="id of a row, such as 64-1")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON", help="the trace")
    parser.add_argument(
        "--detail",
        choices=("parts", "passes"),
        default="parts",
        help="whether the parts of each pass have a track (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")


def run(arguments: argparse.Namespace) -> None:
    """Write the trace and print what fills the step of the slowest stage."""
    projection = read_projection(arguments.projection)
    if arguments.output.resolve() == arguments.projection.resolve():
        raise ConfigError(
            f"output: must be another file than --projection, got {arguments.output}. Choose another name."
        )
    row = projection.select_row(arguments.row)
    if projection.coefficients is None:
        raise ConfigError(
            f"{projection.path}: cost_model must hold the coefficients that predicted the rows, got nothing. "
            "Write the file again with this version's scaling_study.py project."
        )
    trace = build_trace(row.plan, projection.coefficients, has_parts=arguments.detail == "parts")
    _check_time(trace, row, projection.path)
    publish_results({arguments.output: format_trace(trace)}, mark=FORMAT)
    summary = summarise(trace, arguments.output)
    if arguments.json:
        print_json(summary)
    else:
        _print_summary(trace, summary)


def _check_time(trace: StepTrace, row: SavedRow, path: Path) -> None:
    if not math.isclose(trace.step.total_s, row.step_time_s, rel_tol=TIME_TOLERANCE_RATIO):
        raise ConfigError(
            f"{path}: row {row.row_id} must have the step time that this version predicts, got "
            f"step_time_s={row.step_time_s:.6g} and a prediction of {trace.step.total_s:.6g}. "
            "Write the file again with this version's scaling_study.py project."
        )


def summarise(trace: StepTrace, path: Path) -> dict[str, Any]:
    """What the trace shows, for a program."""
    layout = trace.plan.layout
    return {
        "path": str(path),
        "layout": describe_plan(trace.plan),
        "step_time_s": trace.step.total_s,
        "num_stages": layout.pipeline_model_parallel_size,
        "num_chunks": layout.virtual_pipeline_model_parallel_size,
        "num_microbatches": trace.plan.num_microbatches,
        "num_spans": sum(span.end_s > span.start_s for span in trace.spans),
        "slowest_pp_rank": trace.slowest_pp_rank,
        "pass_ratio": trace.pass_ratio,
        "slowest_stage_s": sum_slowest_stage(trace),
    }


def _print_summary(trace: StepTrace, summary: dict[str, Any]) -> None:
    console = open_console()
    rows = [
        (name, f"{1e3 * seconds:,.3f}", f"{seconds / trace.step.total_s:.1%}")
        for name, seconds in summary["slowest_stage_s"].items()
        if seconds > 0
    ]
    console.print(f"{summary['layout']}; stage {trace.slowest_pp_rank}, which sets the pace:")
    console.print(build_table(None, ("span", "ms", "share"), rows))
    if trace.pass_ratio < 1:
        longer = f"{1 / trace.pass_ratio - 1:.2%}"
        console.print(
            f"In Megatron's order these passes take {longer} longer than the cost model's formula says. They are drawn "
            "shorter, so that the step is as long as predicted."
        )
    console.print(
        f"{summary['step_time_s']:.4g} s per step; {summary['num_stages']} stages x {summary['num_chunks']} chunks x "
        f"{summary['num_microbatches']:,} micro-batches, {summary['num_spans']:,} spans; written to {summary['path']}"
    )
