"""Failures and checkpoints of chosen rows of a projection: the save interval, spare nodes, and days with their spread.

Reads projection.json of `project`. The time between failures is that of published clusters, or your own with
--failures-per-1000-gpu-days. The best interval between saves follows from it and from the time of a save.

  goodput --projection study/projection.json --storage-gb-per-s 100
  goodput --projection study/projection.json --rows 4096-1 --storage-gb-per-s 100 --async-save --json
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.scaling.decisions.failures import FailureRate, estimate_failure_rate
from megatron_hammer.scaling.decisions.goodput import (
    DETECTION_S,
    REPAIR_HOURS,
    RESTART_S,
    Goodput,
    Operations,
    estimate_goodput,
)
from megatron_hammer.scaling.decisions.goodput_report import (
    as_object,
    build_goodput_table,
    describe_flags,
    list_assumptions,
)
from megatron_hammer.scaling.report.projection_file import format_json, read_projection
from megatron_hammer.scaling.report.projection_tables import print_table

# The smallest and the largest value of each number that can be meant; beyond them, units were confused.
LIMITS = {
    "storage_gb_per_s": (1e-3, 1e6),
    "stall_s": (0, 1e6),
    "detection_s": (0, 1e6),
    "restart_s": (0, 1e6),
    "failures_per_1000_gpu_days": (1e-6, 1e6),
    "repair_hours": (0, 1e5),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows of which projection, how the cluster is run, and the output."""
    parser.add_argument("--projection", type=Path, required=True, help="projection.json that project wrote")
    parser.add_argument("--rows", help="ids such as 512-1,64-1 (default: the first row of each number of GPUs)")
    add_operation_arguments(parser)
    parser.add_argument("--output-dir", type=Path, help="writes goodput.json there")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")


def add_operation_arguments(parser: argparse.ArgumentParser) -> None:
    """How the cluster is run; `plan` has the same flags."""
    group = parser.add_argument_group("failures and checkpoints")
    group.add_argument(
        "--storage-gb-per-s", type=float, metavar="GB", help="all GPUs together, writing (default: 0.12 for each GPU)"
    )
    group.add_argument("--async-save", action="store_true", help="training continues while a save is written")
    group.add_argument(
        "--stall-s", type=float, metavar="S", help="a save stops training for (default: its write or its host copy)"
    )
    group.add_argument(
        "--failures-per-1000-gpu-days", type=float, metavar="N", help="(default: of published clusters, with spread)"
    )
    group.add_argument("--detection-s", type=float, default=DETECTION_S, metavar="S", help="of a failure (%(default)s)")
    group.add_argument(
        "--restart-s", type=float, default=RESTART_S, metavar="S", help="from then to loading (%(default)s)"
    )
    group.add_argument(
        "--repair-hours", type=float, default=REPAIR_HOURS, metavar="H", help="a failed node is out for (%(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the spread (%(default)s)")


def build_operations(arguments: argparse.Namespace) -> Operations:
    """Raises ConfigError with every flag whose value cannot be meant."""
    problems = []
    for name, (least, most) in LIMITS.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            problems.append(
                f"{name.replace('_', '-')}: must be between {least:g} and {most:g}, got {value:g}. Correct it."
            )
    if arguments.seed < 0:
        problems.append(f"seed: must be at least 0, got {arguments.seed}. Pass another.")
    if problems:
        raise ConfigError(*problems)
    storage, rate = arguments.storage_gb_per_s, arguments.failures_per_1000_gpu_days
    return Operations(
        storage_bytes_per_s=None if storage is None else storage * 1e9,
        has_async_save=arguments.async_save,
        stall_s=arguments.stall_s,
        detection_s=arguments.detection_s,
        restart_s=arguments.restart_s,
        repair_hours=arguments.repair_hours,
        failure_rate=estimate_failure_rate() if rate is None else FailureRate(per_gpu_day=rate / 1000),
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the goodput of the rows and the flags to pass. Exit 2 if no row makes progress."""
    operations = build_operations(arguments)
    projection = read_projection(arguments.projection)
    rows = projection.select_rows(arguments.rows)
    goodputs = [estimate_goodput(row, projection.train_tokens, operations) for row in rows]
    price = projection.usd_per_gpu_hour
    text = format_json(as_object(goodputs, operations, price))
    if arguments.output_dir is not None:
        publish_results({arguments.output_dir / "goodput.json": text})
    stuck = [one.problem for one in goodputs if one.problem is not None]
    if arguments.json:
        print(text, end="")
    else:
        _print_tables(goodputs, operations, price, stuck)
    if len(stuck) == len(goodputs):
        raise ConfigError(*stuck)
    print(
        f"{len(rows)} rows of {len(projection.rows)}, {len(stuck)} without progress",
        file=sys.stderr if arguments.json else sys.stdout,
    )


def _print_tables(goodputs: list[Goodput], operations: Operations, price: float | None, stuck: list[str]) -> None:
    print_table(build_goodput_table(goodputs, price), sys.stdout)
    for one in goodputs:
        if one.problem is None:
            print(describe_flags(one, operations))
    for sentence in (*stuck, *list_assumptions(operations)):
        print(sentence)
