"""Timed operators as the facts and coefficients of this machine, which `profile` writes and `calibrate` starts from.

megatron_hammer.platforms.operator_benchmark times the operators in separate processes, and this module reads its
reports. A known GPU keeps its data sheet and gets the measured ratios. A CPU core has no data sheet, so its peaks are
measured.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hammer.errors import DataError, PlatformError
from megatron_hammer.files.typed import read_json
from megatron_hammer.scaling.cost.coefficients import Coefficients, format_toml_value
from megatron_hammer.scaling.cost.compute import estimate_attention_fill
from megatron_hammer.scaling.measured.sweep_results import Statistic
from megatron_hammer.scaling.plan import Cluster, Gpu, Precision

BENCHMARK_MODULE = "megatron_hammer.platforms.operator_benchmark"
POINTWISE = ("add", "rms_norm", "swiglu", "cross_entropy_with_backward", "adam")
# Small messages show the latency of a collective, and large ones its bandwidth.
SMALL_MESSAGE_BYTES, LARGE_MESSAGE_BYTES = 4096, 2**20
GATHERS = ("all_gather", "reduce_scatter")
SOURCE = "scaling_study.py profile"  # of the tables of a machine
TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One operator of a report."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    median_s: float
    fastest_s: float
    flops: float
    num_bytes: float
    seconds: float = 0.0  # not in the file: the statistic that read_report was asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorReport:
    """What one start of the benchmark measured."""

    device_name: str
    platform: str
    num_processes: int
    num_threads: int
    num_cores: int
    num_multiprocessors: int
    memory_bytes: int
    timings: tuple[Timing, ...]

    def select(self, *operators: str) -> list[Timing]:
        return [timing for timing in self.timings if timing.operator in operators]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostProfile:
    """This machine, as the performance model describes one."""

    gpu: Gpu
    cluster: Cluster
    coefficients: Coefficients


def time_operators(
    output_path: Path,
    *,
    platform: str,
    num_processes: int,
    seconds_per_operator: float,
    precisions: Sequence[str],
    statistic: Statistic = "median",
) -> OperatorReport:
    """Run the benchmark in `num_processes` processes on this machine, with one thread each on a CPU.

    Raises PlatformError with the last lines of its output if it fails.
    """
    launch = [] if num_processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launch += [] if num_processes == 1 else ["--nproc-per-node", str(num_processes)]
    options = ["--platform", platform, "--output", str(output_path)]
    options += ["--seconds-per-operator", str(seconds_per_operator)]
    options += [word for precision in precisions for word in ("--precision", precision)]
    command = [sys.executable, *launch, "-m", BENCHMARK_MODULE, *options]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if result.returncode != 0:
        last = " | ".join(line.strip() for line in result.stderr.strip().splitlines()[-3:])
        raise PlatformError(
            f"profile: the operators of {num_processes} process(es) must run on {platform}, got exit code "
            f"{result.returncode}: {last}. Check the installation with hammer check-environment."
        )
    return read_report(output_path, statistic)


def read_report(path: Path, statistic: Statistic = "median") -> OperatorReport:
    """Raises DataError for a file that the benchmark did not write."""
    report = read_json(path, OperatorReport, remedy="Run profile again.")
    timings = (
        replace(timing, seconds=timing.median_s if statistic == "median" else timing.fastest_s)
        for timing in report.timings
    )
    return replace(report, timings=tuple(timings))


def build_profile(
    alone: OperatorReport, together: OperatorReport | None, *, gpu: Gpu, cluster: Cluster, start: Coefficients
) -> HostProfile:
    """This machine, from the operators of one process and the collectives of several (None: the cluster is unchanged).

    gpu, cluster: what is known about them. Measured values replace a CPU's peaks and the links of a CPU host.
    """
    is_cpu = alone.platform == "cpu"
    measured_gpu = _measure_gpu(alone, gpu) if is_cpu else gpu
    own = replace(
        start.select_gpu(gpu),
        gemm_ratio=_measure_gemm_ratio(alone, measured_gpu),
        attention_ratio=_measure_attention_ratio(alone, measured_gpu, start.attention_fill_tokens),
        memory_ratio=_measure_memory_ratio(alone, measured_gpu),
        num_multiprocessors=alone.num_multiprocessors,
    )
    fp8_gemms = [timing for timing in alone.select("gemm") if timing.dtype == "fp8"]
    if fp8_gemms and gpu.fp8_tflops:
        own = replace(own, gemm_8bit_ratio=_measure_large_gemms(fp8_gemms, gpu.fp8_tflops))
    coefficients = replace(start, gpus={**start.gpus, gpu.name: own})
    measured_cluster = cluster
    if together is not None:
        bandwidth = _measure_bandwidth(together)
        if is_cpu:
            measured_cluster = _measure_cluster(together, cluster, bandwidth, start.collective_s)
            # The measured bandwidth already is what collectives reach, so no ratio may lower it again.
            coefficients = replace(coefficients, nvlink_ratio=1.0, hop_ratio=1.0)
        else:
            coefficients = replace(coefficients, nvlink_ratio=min(1.0, bandwidth / cluster.nvlink_bytes_per_s))
    return HostProfile(gpu=measured_gpu, cluster=measured_cluster, coefficients=coefficients)


def _rate(timings: Iterable[Timing], quantity: str) -> float:
    """Sum of the quantity over the sum of seconds, so long operators have more weight."""
    chosen = list(timings)
    return sum(getattr(timing, quantity) for timing in chosen) / sum(timing.seconds for timing in chosen)


def _measure_gpu(report: OperatorReport, gpu: Gpu) -> Gpu:
    """Peaks of one core: its fastest product, its fastest copy, its share of the memory."""
    peaks = {
        f"{dtype}_tflops": max(t.flops / t.fastest_s for t in report.select("gemm") if t.dtype == dtype) / 1e12
        for dtype in {timing.dtype for timing in report.select("gemm")}
    }
    fp32_tflops = peaks.get("fp32_tflops", gpu.fp32_tflops)
    return replace(
        gpu,
        source=f"{SOURCE}: {report.num_threads} thread(s) of one of {report.num_cores} cores",
        fp32_tflops=fp32_tflops,
        fp16_tflops=peaks.get("fp16_tflops", fp32_tflops),
        bf16_tflops=peaks.get("bf16_tflops", fp32_tflops),
        memory_bytes=report.memory_bytes // report.num_cores,
        memory_bytes_per_s=max(timing.num_bytes / timing.fastest_s for timing in report.select("copy")),
    )


def _measure_gemm_ratio(report: OperatorReport, gpu: Gpu) -> float:
    """The reached ratio of the peak, in 16-bit products if they were timed, else in fp32."""
    return _measure_large_gemms(*_select_timings(report, gpu, "gemm", "matrix products"))


def _select_timings(report: OperatorReport, gpu: Gpu, operator: str, words: str) -> tuple[list[Timing], float]:
    """(timings of an operator, peak in TFLOP/s), in the first of bf16, fp16 and fp32 that was timed and has a peak."""
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    for precision in precisions:
        timings = [timing for timing in report.select(operator) if timing.dtype == precision]
        peak = gpu.find_peak_tflops(precision)
        if timings and peak:
            return timings, peak
    raise DataError(f"profile: must hold {words} of bf16, fp16 or fp32, got none. Run profile again.")


def _measure_large_gemms(gemms: Sequence[Timing], peak_tflops: float) -> float:
    """The reached ratio of the peak, over the larger half of the shapes."""
    by_size = sorted(gemms, key=lambda timing: timing.flops)
    # Small products are slowed by filling the multiprocessors, for which there is gemm_fill_waves.
    return _rate(by_size[len(by_size) // 2 :], "flops") / (1e12 * peak_tflops)


def _measure_attention_ratio(report: OperatorReport, gpu: Gpu, fill_tokens: float) -> float:
    """The ratio of the peak at full speed. Short sequences and narrow heads are corrected as in cost/compute.py."""
    timings, peak = _select_timings(report, gpu, "attention_with_backward", "attention")
    full_flops = 0.0
    for timing in timings:
        length, head_dim = timing.shape[-2:]
        full_flops += timing.flops / estimate_attention_fill(length, head_dim, fill_tokens)
    return full_flops / sum(timing.seconds for timing in timings) / (1e12 * peak)


def _measure_memory_ratio(report: OperatorReport, gpu: Gpu) -> float:
    return _rate(report.select(*POINTWISE), "num_bytes") / gpu.memory_bytes_per_s


def _measure_bandwidth(report: OperatorReport) -> float:
    """Bytes per second that one rank sends in large gathers and scatters."""
    large = [timing for timing in report.select(*GATHERS) if timing.num_bytes >= LARGE_MESSAGE_BYTES]
    # A rank of a ring sends (n - 1) / n of the bytes: see cost/communication.py.
    return _rate(large, "num_bytes") * (report.num_processes - 1) / report.num_processes


def _measure_cluster(report: OperatorReport, cluster: Cluster, bandwidth: float, collective_s: float) -> Cluster:
    """The links between processes of this host. The latency is that of small gathers without their start-up time."""
    small = [timing.seconds for timing in report.select(*GATHERS) if timing.num_bytes <= SMALL_MESSAGE_BYTES]
    latency_s = max(0.0, sum(small) / len(small) - collective_s) / (report.num_processes - 1)
    return replace(
        cluster,
        source=f"{SOURCE}: gloo between {report.num_processes} processes on {report.num_cores} cores",
        nvlink_bytes_per_s=bandwidth,
        nvlink_latency_s=latency_s,
        full_speed_processes_per_node=max(1, report.num_cores // report.num_threads),
    )


def format_gpu(gpu: Gpu) -> str:
    """A table of gpus.toml that replaces fields of the shipped table with that name."""
    names = ("source", "fp32_tflops", "fp16_tflops", "bf16_tflops", "memory_bytes", "memory_bytes_per_s")
    return _format_table(gpu.name, {name: getattr(gpu, name) for name in names})


def format_cluster(cluster: Cluster) -> str:
    """A table of clusters.toml that replaces fields of the shipped table with that name."""
    names = ("source", "gpu", "nvlink_bytes_per_s", "nvlink_latency_s", "full_speed_processes_per_node")
    return _format_table(cluster.name, {name: getattr(cluster, name) for name in names})


def _format_table(name: str, values: dict[str, Any]) -> str:
    lines = [f"[{name}]"]
    for field, value in values.items():
        if value is not None:
            lines.append(f"{field} = {format_toml_value(value)}")
    return "\n".join(lines) + "\n"
