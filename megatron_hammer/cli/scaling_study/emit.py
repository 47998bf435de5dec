"""Launch scripts for chosen rows of a projection.

Reads projection.json of `project`. For each row it writes a script for torchrun or SLURM, or a manifest for Kubernetes.
With DRY_RUN=1 a script only prints what would run. Further flags are passed on to training.
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.scaling.launch.launch_scripts import (
    LAUNCHERS,
    SUFFIXES,
    KubernetesOptions,
    Launch,
    build_launch,
    render,
)
from megatron_hammer.scaling.report.projection_file import SavedProjection, SavedRow, read_projection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows of which projection, for which launchers, and what only the user of the cluster knows."""
    parser.add_argument("--projection", type=Path, required=True, help="projection.json that project wrote")
    parser.add_argument("--rows", help="ids such as 512-1,64-1 (default: the fastest row of each number of GPUs)")
    parser.add_argument(
        "--launcher",
        default="torchrun",
        help=f"one or several of {', '.join(LAUNCHERS)}, with commas (default: torchrun)",
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--image", default=KubernetesOptions().image, help="of the Kubernetes pods")
    parser.add_argument("--volume-claim", default=KubernetesOptions().volume_claim, help="mounted at /workspace")


def run(arguments: argparse.Namespace) -> None:
    """Write the scripts and print their paths to stdout. All are rendered before the first one is written."""
    projection = read_projection(arguments.projection)
    launchers = [word for word in arguments.launcher.split(",") if word]
    unknown = [word for word in launchers if word not in LAUNCHERS]
    if unknown or not launchers:
        got = ", ".join(unknown) or "none"
        raise ConfigError(f"launcher: must be of {', '.join(LAUNCHERS)}, got {got}. Choose one of them, or several.")
    rows = select_rows(projection, arguments.rows)
    launches = [build_row_launch(projection, row) for row in rows]
    options = KubernetesOptions(image=arguments.image, volume_claim=arguments.volume_claim)
    files: dict[Path, str | bytes] = {
        arguments.output_dir / f"{launch.name}{SUFFIXES[launcher]}": render(launch, launcher, options)
        for launch in launches
        # In the order of LAUNCHERS, each once, whatever order or repetition the flag has.
        for launcher in LAUNCHERS
        if launcher in launchers
    }
    publish_files(files)
    for path in files:
        print(path)
    print(f"{len(rows)} rows of {len(projection.rows)} emitted, {len(files)} files", file=sys.stderr)


def select_rows(projection: SavedProjection, ids: str | None) -> list[SavedRow]:
    """The rows with these ids, or the fastest of each size. Raises ConfigError for an unknown id or without rows."""
    if ids is not None:
        # A repeated id would be counted as two rows of one file.
        chosen = [projection.select_row(row_id) for row_id in dict.fromkeys(ids.split(",")) if row_id]
        if not chosen:
            raise ConfigError(f"rows: must name a row, got {ids!r}. Pass ids such as 512-1,64-1, or leave --rows out.")
        return chosen
    # Rows are ranked within each number of GPUs, so there is one for each size.
    fastest = [row for row in projection.rows if row.rank == 1]
    if not fastest:
        raise ConfigError(f"{projection.path}: must hold a row, got none. Project sizes on which the model fits.")
    return fastest


def build_row_launch(projection: SavedProjection, row: SavedRow) -> Launch:
    """The launch of one row. Raises ConfigError if its ranks do not fill whole nodes."""
    plan = row.plan
    return build_launch(
        plan,
        model_arguments=build_model_arguments(plan.model),
        name=f"{plan.model.name}-{row.row_id}",
        train_tokens=projection.train_tokens,
        comment=f"{plan.model.name} on {row.num_gpus} x {plan.gpu.name} ({plan.cluster.name}), row {row.row_id}; "
        f"predicted {row.step_time_s:.4g} s a step ({row.low_s:.4g} to {row.high_s:.4g}).",
    )
