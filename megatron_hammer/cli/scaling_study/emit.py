"""Launch scripts for chosen rows of a projection.

Reads projection.json of `project`. For each row it writes a script for torchrun or SLURM (a job, or an array of jobs
for a sweep), or a manifest for Kubernetes (an Indexed Job, a JobSet, or a TrainJob of Kubeflow).
With DRY_RUN=1 a script only prints what would run. Further flags are passed on to training.
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.config.model_arguments import build_model_arguments
from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_results
from megatron_hammer.scaling.launch.launch_scripts import (
    KUBERNETES_LAUNCHERS,
    LAUNCHERS,
    SUFFIXES,
    KubernetesOptions,
    Launch,
    Launcher,
    build_launch,
    read_rdma,
    read_sweep,
    render,
)
from megatron_hammer.scaling.report.projection_file import SavedProjection, SavedRow, read_projection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows of which projection, for which launchers, and what only the user of the cluster knows."""
    parser.add_argument("--projection", type=Path, required=True, help="projection.json that project wrote")
    parser.add_argument("--rows", help="ids such as 512-1,64-1 (default: the first row of each number of GPUs)")
    parser.add_argument(
        "--launcher",
        default="torchrun",
        help=f"one or several of {', '.join(LAUNCHERS)}, with commas (default: torchrun)",
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--sweep", type=Path, help="of slurm-array: a file with the flags of one task on each line, such as --lr 3e-4"
    )
    names = KubernetesOptions()
    pods = parser.add_argument_group("Kubernetes")
    pods.add_argument("--image", help=f"of the pods (default: {names.image})")
    pods.add_argument("--volume-claim", help=f"mounted at /workspace, for outputs (default: {names.volume_claim})")
    pods.add_argument("--data-claim", help="mounted at /data, read-only (default: none)")
    pods.add_argument("--queue", help="LocalQueue of Kueue (default: none)")
    pods.add_argument(
        "--rdma", metavar="RESOURCE=COUNT", help="network cards of a pod, such as rdma/rdma_shared_device_a=1"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the scripts and print their paths to stdout. All are rendered before the first one is written."""
    projection = read_projection(arguments.projection)
    launchers = read_launchers(arguments.launcher)
    options, sweep = read_options(arguments, launchers)
    rows = projection.select_rows(arguments.rows)
    launches = [build_row_launch(projection, row) for row in rows]
    check_network(launches, options)
    files: dict[Path, str | bytes] = {
        arguments.output_dir / f"{launch.name}{SUFFIXES[launcher]}": render(launch, launcher, options, sweep=sweep)
        for launch in launches
        for launcher in launchers
    }
    publish_results(files)
    for path in files:
        print(path)
    print(f"{len(rows)} rows of {len(projection.rows)} emitted, {len(files)} files", file=sys.stderr)


def read_launchers(words: str) -> list[Launcher]:
    """Each once and in the order of LAUNCHERS, whatever order or repetition the flag has."""
    named = [word for word in words.split(",") if word]
    unknown = [word for word in named if word not in LAUNCHERS]
    if unknown or not named:
        got = ", ".join(unknown) or "none"
        raise ConfigError(f"launcher: must be of {', '.join(LAUNCHERS)}, got {got}. Choose one of them, or several.")
    return [launcher for launcher in LAUNCHERS if launcher in named]


def read_options(arguments: argparse.Namespace, launchers: list[Launcher]) -> tuple[KubernetesOptions, list[str]]:
    """What only some launchers take. Raises ConfigError for a flag that none of the chosen launchers reads."""
    got = ", ".join(launchers)
    given = {name: getattr(arguments, name) for name in ("image", "volume_claim", "data_claim", "queue", "rdma")}
    given = {name: value for name, value in given.items() if value is not None}
    problems = []
    if not set(launchers) & set(KUBERNETES_LAUNCHERS):
        problems = [
            f"{name.replace('_', '-')}: must be given with a launcher of Kubernetes, got launcher={got}. "
            f"Use --launcher {KUBERNETES_LAUNCHERS[-1]}, or leave the flag out."
            for name in given
        ]
    if (arguments.sweep is not None) != ("slurm-array" in launchers):
        problems.append(
            f"sweep: must be given with the launcher slurm-array and only then, got sweep={arguments.sweep}, "
            f"launcher={got}. Add the other one, or leave both out."
        )
    if problems:
        raise ConfigError(*problems)
    if "rdma" in given:
        given["rdma"] = read_rdma(given["rdma"])
    return KubernetesOptions(**given), [] if arguments.sweep is None else read_sweep(arguments.sweep)


def check_network(launches: list[Launch], options: KubernetesOptions) -> None:
    """Raises ConfigError for network cards that a row of CPUs would not use."""
    names = [launch.name for launch in launches if launch.is_cpu]
    if names and options.rdma is not None:
        raise ConfigError(
            f"rdma: must be given for rows of GPUs only, because gloo does not use it, got {', '.join(names)}. "
            "Leave the flag out."
        )


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
