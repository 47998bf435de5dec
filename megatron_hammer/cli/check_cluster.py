"""Check a cluster before a run: GPUs, memory, links, clocks, the shared folder, and what must be equal on all hosts.

    torchrun --nproc-per-node 8 tools/check_cluster.py --preset hammer-1b4 --tensor-model-parallel-size 2 --save DIR

All flags of training are accepted; the groups of its layout are built and timed. Exit code 0: no problem was found; 1:
there are problems, each named by host; 2: a bad command line. What could not be checked is said to be unknown.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer.config.environment import read_slurm_variables
from megatron_hammer.errors import ConfigError, exit_on_user_error
from megatron_hammer.files.command_line import CommandParser, parse_new_name

if TYPE_CHECKING:
    from megatron_hammer.config.run_plan import RunPlan

DEFAULT_CLUSTER = "measured"
DEFAULT_PRESET = "hammer-1b4"
# A command line with one of these describes its own model.
MODEL_FLAGS = ("--preset", "--load-hf", "--num-layers")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see --help. Returns 1 if a problem was found."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = CommandParser(__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="of one stage (default: 180)")
    parser.add_argument("--memory-gib", type=float, help="memory to test on each rank (default: half of a free GPU)")
    parser.add_argument("--shared-dir", type=Path, help="folder that all hosts share (default: the run's --save)")
    parser.add_argument("--file-mib", type=int, default=256, help="size of each host's file (default: 256)")
    parser.add_argument("--max-clock-skew-s", type=float, default=1.0, help="allowed between hosts (default: 1)")
    parser.add_argument(
        "--output-clusters-file", type=parse_new_name, help="write the links, for scaling-study --clusters-file"
    )
    parser.add_argument("--cluster-name", help=f"of the table in that file (default: {DEFAULT_CLUSTER})")
    # allow_abbrev=False above: an abbreviated flag of training must not be taken for one of these.
    arguments, rest = parser.parse_known_args(argv)

    # After the flags are parsed: --help must not wait for torch and megatron.
    from megatron_hammer.training.cluster.check_cluster import CheckOptions, ClusterCheck, check_options
    from megatron_hammer.training.cluster.cluster_table import check_cluster_path

    options = CheckOptions(
        command=shlex.join(["check_cluster.py", *argv]),
        as_json=arguments.json,
        timeout_s=arguments.timeout_s,
        memory_gib=arguments.memory_gib,
        file_mib=arguments.file_mib,
        shared_dir=arguments.shared_dir,
        most_skew_s=arguments.max_clock_skew_s,
        cluster_path=arguments.output_clusters_file,
        cluster_name=DEFAULT_CLUSTER if arguments.cluster_name is None else arguments.cluster_name,
    )
    if arguments.cluster_name is not None and options.cluster_path is None:
        raise ConfigError(
            f"cluster-name: must be given with --output-clusters-file, got {arguments.cluster_name!r} alone. "
            "Add that flag, or leave this one out."
        )
    check_options(options)
    plan = read_cluster_plan(rest)
    if options.cluster_path is not None and plan.machine.rank == 0:
        check_cluster_path(options.cluster_path, options.cluster_name)
    return ClusterCheck(plan, options).run()


def read_cluster_plan(argv: Sequence[str]) -> "RunPlan":
    """The plan of this rank, from training's flags; without a model among them, that of DEFAULT_PRESET.

    Raises ConfigError with every problem of the model, the layout and the number of processes.
    """
    from megatron_hammer.config.own_flags import read_option
    from megatron_hammer.training.pretrain import prepare

    os.environ.update(read_slurm_variables(os.environ))
    if all(read_option(argv, flag) is None for flag in MODEL_FLAGS):
        argv = ["--preset", DEFAULT_PRESET, *argv]
    arguments = prepare(argv)

    from megatron_hammer.config.preflight.layout import find_device_problems, find_run_layout_problems
    from megatron_hammer.config.values import find_missing_problems, find_value_problems
    from megatron_hammer.platforms.device import stand_alone

    settings = arguments.settings
    problems = find_missing_problems(settings.flags) + find_value_problems(settings.flags)
    problems = problems or [*find_run_layout_problems(settings), *find_device_problems(settings.machine)]
    if settings.output.is_dry_run or "requested_world_size" in settings.flags.typed:
        problems.append(
            "check-cluster: takes neither --dry-run nor --world-size, because it measures real processes. "
            "Start as many as the run will have, or use pretrain --dry-run."
        )
    if problems:
        raise ConfigError(*problems)
    stand_alone()
    return arguments.require_plan()
