"""This machine's operators, timed.

Times matrix products, attention, norms, activations, the loss, the optimizer and copies on one GPU or one CPU core, and
collectives between several processes. Writes what the performance model needs to know about this machine:

    OUTPUT_DIR/gpus.toml, clusters.toml   for --gpus-file and --clusters-file (a CPU host: cpu-core, cpu-host)
    OUTPUT_DIR/coefficients.toml          for calibrate --start, or for --coefficients if there are no runs to fit
    OUTPUT_DIR/operators-N.json           every timing, with N processes
"""

import argparse
import sys
from pathlib import Path

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.publish import publish_files, require_results
from megatron_hammer.scaling.cost.coefficients import MARK, format_coefficients, load_coefficients
from megatron_hammer.scaling.hardware.catalogue import (
    find_gpu_by_device_name,
    select_cluster,
    select_default_cluster,
    select_gpu,
)
from megatron_hammer.scaling.hardware.visible_gpus import find_gpus
from megatron_hammer.scaling.measured.operator_profile import (
    SOURCE,
    HostProfile,
    OperatorReport,
    build_profile,
    format_cluster,
    format_gpu,
    time_operators,
)
from megatron_hammer.scaling.plan import Gpu

TABLES = ("gpus.toml", "clusters.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time, and which GPU and cluster of the data files this machine is."""
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there is")
    parser.add_argument(
        "--processes", type=int, default=2, help="for collectives, at most one per GPU; 1 leaves them out (default: 2)"
    )
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16", "fp16"], help="default: by platform")
    parser.add_argument(
        "--statistic",
        choices=["median", "fastest"],
        default="median",
        help="of the calls; fastest for a busy machine (default: median)",
    )
    parser.add_argument("--seconds-per-operator", type=float, default=0.3, help="default: 0.3")
    parser.add_argument("--gpu", help="name in gpus.toml (default: found by the device's name, or cpu-core)")
    parser.add_argument("--cluster", help="name in clusters.toml (default: the first of that GPU; cpu-host on a CPU)")
    parser.add_argument("--gpus-file", type=Path, help="TOML of GPUs that changes or extends the shipped ones")
    parser.add_argument("--clusters-file", type=Path, help="TOML of clusters that changes or extends the shipped ones")
    parser.add_argument("--coefficients", type=Path, help="for what is not measured (default: the shipped ones)")


def run(arguments: argparse.Namespace) -> None:
    """Time the operators and write the files. Raises PlatformError if cuda is asked for and there is no GPU."""
    if arguments.processes < 1:
        raise ConfigError(f"processes: must be at least 1, got {arguments.processes}. Raise it.")
    gpu_names = find_gpus(arguments.platform)
    platform = "cuda" if gpu_names else "cpu"
    # NCCL allows one process per GPU; CPU processes may be any number.
    num_processes = min(arguments.processes, len(gpu_names)) if gpu_names else arguments.processes
    gpu = select_measured_gpu(arguments, gpu_names[0] if gpu_names else None)
    # A CPU host is not found through a GPU, so it has a fixed name.
    cluster_name = arguments.cluster or ("cpu-host" if platform == "cpu" else None)
    files = {"path": arguments.clusters_file, "gpus_path": arguments.gpus_file}
    cluster = select_cluster(cluster_name, **files) if cluster_name else select_default_cluster(gpu.name, **files)
    require_own_files(arguments.output_dir, platform, num_processes)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    # Operators in one process first: with several, they share memory and cores and are slower.
    alone = time_reported(arguments, platform, 1)
    together = time_reported(arguments, platform, num_processes) if num_processes > 1 else None
    start = load_coefficients(arguments.coefficients)
    profile = build_profile(alone, together, gpu=gpu, cluster=cluster, start=start)
    write_profile(profile, alone, arguments.output_dir)
    num_timings = len(alone.timings) + (len(together.timings) if together else 0)
    print(f"profile: {num_timings} timings, {gpu.name} on {cluster.name} in {arguments.output_dir}", file=sys.stderr)


def select_measured_gpu(arguments: argparse.Namespace, device_name: str | None) -> Gpu:
    """Raises ConfigError for a GPU that no data file describes."""
    if arguments.gpu is not None:
        return select_gpu(arguments.gpu, arguments.gpus_file)
    # Without a GPU, the device is one core of the CPU.
    if device_name is None:
        return select_gpu("cpu-core", arguments.gpus_file)
    return find_gpu_by_device_name(device_name) or select_gpu(device_name, arguments.gpus_file)


def time_reported(arguments: argparse.Namespace, platform: str, num_processes: int) -> OperatorReport:
    """Time the operators in so many processes, with a line of progress on stderr. The file is operators-N.json."""
    print(f"timing operators with {num_processes} process(es) on {platform}", file=sys.stderr, flush=True)
    return time_operators(
        arguments.output_dir / f"operators-{num_processes}.json",
        platform=platform,
        num_processes=num_processes,
        seconds_per_operator=arguments.seconds_per_operator,
        precisions=arguments.precision or (),
        statistic=arguments.statistic,
    )


def require_own_files(folder: Path, platform: str, num_processes: int) -> None:
    """Raise OutputError, before anything is timed, if a file of another origin would be replaced."""
    require_results([folder / "coefficients.toml"], mark=MARK)
    if platform == "cpu":
        require_results([folder / name for name in TABLES], mark=SOURCE)
    for number in (1, num_processes):
        require_results([folder / f"operators-{number}.json"], mark='"timings"')


def write_profile(profile: HostProfile, alone: OperatorReport, output_dir: Path) -> None:
    """The three files together, and the figures on stdout."""
    gpu, cluster = profile.gpu, profile.cluster
    own = profile.coefficients.gpus[gpu.name]
    files: dict[Path, str | bytes] = {output_dir / "coefficients.toml": format_coefficients(profile.coefficients)}
    # A known GPU keeps its data sheet, and its measured ratios are in the coefficients.
    if alone.platform == "cpu":
        tables = (format_gpu(gpu), format_cluster(cluster))
        files |= {output_dir / name: text for name, text in zip(TABLES, tables, strict=True)}
    publish_files(files)
    # TFLOP/s x 1000 = GFLOP/s; a CPU core is well below one TFLOP/s.
    print(f"{gpu.name}: {alone.device_name}, fp32 {1e3 * gpu.fp32_tflops:.4g} GFLOP/s, ", end="")
    print(f"memory {gpu.memory_bytes_per_s / 1e9:.4g} GB/s")
    print(f"ratios delivered: products {own.gemm_ratio:.3f}, attention {own.attention_ratio:.3f}, ", end="")
    print(f"memory {own.memory_ratio:.3f}")
    print(f"{cluster.name}: {cluster.nvlink_bytes_per_s / 1e9:.4g} GB/s and ", end="")
    print(f"{1e6 * cluster.nvlink_latency_s:.4g} us between processes of a node")
