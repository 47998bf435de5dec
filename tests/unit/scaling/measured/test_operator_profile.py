"""From timings to this machine's peaks, wires and coefficients: known speeds are found."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import DataError, PlatformError
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.compute import HEAD_DIM_FILL
from megatron_hammer.scaling.hardware.catalogue import load_clusters, load_gpus, select_cluster, select_gpu
from megatron_hammer.scaling.measured import operator_profile
from megatron_hammer.scaling.measured.operator_profile import (
    build_profile,
    format_cluster,
    format_gpu,
    read_report,
    time_operators,
)

PEAK_FLOPS_PER_S, COPY_BYTES_PER_S = 80e9, 12e9
BANDWIDTH_BYTES_PER_S, SMALL_GATHER_S = 2e9, 3e-4


def timing(operator: str, shape: tuple[int, ...], seconds: float, *, flops: float = 0.0, num_bytes: float = 0.0) -> Any:
    return {
        "operator": operator, "shape": shape, "dtype": "fp32", "num_processes": 1, "median_s": seconds,
        "fastest_s": 0.9 * seconds, "flops": flops, "num_bytes": num_bytes,
    }  # fmt: skip


def write_report(path: Path, timings: list[Any], **changes: Any) -> Path:
    header = {
        "device_name": "CPU process", "platform": "cpu", "num_processes": 1, "num_threads": 1, "num_cores": 4,
        "num_multiprocessors": 1, "memory_bytes": 2**34, "versions": {},
    }  # fmt: skip
    path.write_text(json.dumps(header | changes | {"timings": timings}))
    return path


def write_alone(path: Path, *, fill_tokens: float, **changes: Any) -> Path:
    """Products at 90 % of the peak (fastest: the peak), attention at 30 % of it before its fill, pointwise at 25 %."""
    products = [
        timing("gemm", (n, n, n), 2 * n**3 / (0.9 * PEAK_FLOPS_PER_S), flops=2 * n**3) for n in (256, 512, 1024)
    ]
    length, width = 512, 64
    fill = length / (length + fill_tokens) * width / (width + HEAD_DIM_FILL) * (128 + HEAD_DIM_FILL) / 128
    attention_s = 1e9 / (0.3 * PEAK_FLOPS_PER_S * fill)
    return write_report(
        path,
        [
            *products,
            timing("attention_with_backward", (2, 8, length, width), attention_s, flops=1e9),
            timing("copy", (100,), 1e9 / (0.9 * COPY_BYTES_PER_S), num_bytes=1e9),
            timing("rms_norm", (100,), 1e9 / (0.25 * COPY_BYTES_PER_S), num_bytes=1e9),
            timing("adam", (100,), 2e9 / (0.25 * COPY_BYTES_PER_S), num_bytes=2e9),
        ],
        **changes,
    )


def write_together(path: Path, **changes: Any) -> Path:
    """Gathers of four ranks: each sends three quarters of the bytes."""
    gathers = [
        timing(name, (1,), max(SMALL_GATHER_S, 0.75 * size / BANDWIDTH_BYTES_PER_S), num_bytes=size)
        for size in (1024, 4096, 2**22, 2**24)
        for name in ("all_gather", "reduce_scatter")
    ]
    return write_report(path, gathers, num_processes=4, **changes)


def test_known_speeds_of_a_cpu_are_found(tmp_path: Path) -> None:
    start = load_coefficients()
    alone = read_report(write_alone(tmp_path / "1.json", fill_tokens=start.attention_fill_tokens))
    together = read_report(write_together(tmp_path / "4.json"))
    profile = build_profile(
        alone, together, gpu=select_gpu("cpu-core"), cluster=select_cluster("cpu-host"), start=start
    )
    own = profile.coefficients.select_gpu(profile.gpu)
    assert profile.gpu.fp32_tflops == pytest.approx(PEAK_FLOPS_PER_S / 1e12)
    assert profile.gpu.memory_bytes_per_s == pytest.approx(COPY_BYTES_PER_S)
    assert profile.gpu.memory_bytes == 2**32
    assert (own.gemm_ratio, own.attention_ratio, own.memory_ratio) == pytest.approx((0.9, 0.3, 0.25))
    assert profile.cluster.nvlink_bytes_per_s == pytest.approx(BANDWIDTH_BYTES_PER_S)
    assert profile.coefficients.nvlink_ratio == 1.0
    latency_s = 3 * profile.cluster.nvlink_latency_s + start.collective_s
    assert latency_s == pytest.approx(max(SMALL_GATHER_S, start.collective_s))
    assert profile.cluster.full_speed_processes_per_node == 4


def test_files_are_laid_over_the_shipped_ones(tmp_path: Path) -> None:
    start = load_coefficients()
    alone = read_report(write_alone(tmp_path / "1.json", fill_tokens=start.attention_fill_tokens), "fastest")
    together = read_report(write_together(tmp_path / "4.json"), "fastest")
    cpu, host = select_gpu("cpu-core"), select_cluster("cpu-host")
    profile = build_profile(alone, together, gpu=cpu, cluster=host, start=start)
    gpus_path, clusters_path = tmp_path / "gpus.toml", tmp_path / "clusters.toml"
    gpus_path.write_text(format_gpu(profile.gpu))
    clusters_path.write_text(format_cluster(profile.cluster))
    gpu = load_gpus(gpus_path)["cpu-core"]
    assert gpu.fp32_tflops == pytest.approx(profile.gpu.fp32_tflops, rel=1e-5)
    assert (gpu.source, gpu.power_w) == (profile.gpu.source, cpu.power_w)
    cluster = load_clusters(clusters_path, gpus_path=gpus_path)["cpu-host"]
    assert cluster.nvlink_latency_s == pytest.approx(profile.cluster.nvlink_latency_s, rel=1e-5)
    assert (cluster.full_speed_processes_per_node, cluster.gpus_per_node) == (4, host.gpus_per_node)


def test_a_gpu_keeps_its_data_sheet(tmp_path: Path) -> None:
    gpu, cluster, start = select_gpu("h100-sxm"), select_cluster("dgx-h100"), load_coefficients()
    alone_path = write_alone(tmp_path / "1.json", fill_tokens=start.attention_fill_tokens, platform="cuda")
    profile = build_profile(
        read_report(alone_path), read_report(write_together(tmp_path / "4.json", platform="cuda")), gpu=gpu,
        cluster=cluster, start=start,
    )  # fmt: skip
    assert (profile.gpu, profile.cluster) == (gpu, cluster)
    own = profile.coefficients.gpus[gpu.name]
    assert own.gemm_ratio == pytest.approx(0.9 * PEAK_FLOPS_PER_S / 1e12 / gpu.fp32_tflops)
    assert profile.coefficients.nvlink_ratio == pytest.approx(BANDWIDTH_BYTES_PER_S / cluster.nvlink_bytes_per_s)
    assert own.gemm_8bit_ratio == start.select_gpu(gpu).gemm_8bit_ratio
    assert "hopper" in profile.coefficients.gpus


def test_fp8_products_have_a_ratio_of_their_own(tmp_path: Path) -> None:
    gpu, start = select_gpu("h100-sxm"), load_coefficients()
    assert gpu.fp8_tflops is not None
    path = write_alone(tmp_path / "1.json", fill_tokens=start.attention_fill_tokens, platform="cuda")
    content = json.loads(path.read_text())
    content["timings"].append(timing("gemm", (1, 1, 1), 1e-3, flops=0.55e9 * gpu.fp8_tflops) | {"dtype": "fp8"})
    path.write_text(json.dumps(content))
    profile = build_profile(read_report(path), None, gpu=gpu, cluster=select_cluster("dgx-h100"), start=start)
    assert profile.coefficients.gpus[gpu.name].gemm_8bit_ratio == pytest.approx(0.55)


def test_without_collectives_the_network_coefficients_stay(tmp_path: Path) -> None:
    start, cluster = load_coefficients(), select_cluster("cpu-host")
    alone = read_report(write_alone(tmp_path / "1.json", fill_tokens=start.attention_fill_tokens))
    profile = build_profile(alone, None, gpu=select_gpu("cpu-core"), cluster=cluster, start=start)
    assert profile.cluster == cluster
    assert profile.coefficients.nvlink_ratio == start.nvlink_ratio


def test_incomplete_reports_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    path.write_text('{"timings": []}')
    with pytest.raises(
        DataError, match=r"operators\.json: device_name must be given, got nothing\. Run profile again\."
    ):
        read_report(path)
    start = load_coefficients()
    alone = read_report(write_alone(path, fill_tokens=1.0, platform="cuda"))
    without = [entry for entry in alone.timings if entry.operator != "gemm"]
    empty = operator_profile.replace(alone, timings=tuple(without))
    match = r"profile: must hold matrix products of bf16, fp16 or fp32, got none\. Run profile again\."
    with pytest.raises(DataError, match=match):
        build_profile(empty, None, gpu=select_gpu("h100-sxm"), cluster=select_cluster("dgx-h100"), start=start)
    without = [entry for entry in alone.timings if entry.operator != "attention_with_backward"]
    empty = operator_profile.replace(alone, timings=tuple(without))
    with pytest.raises(DataError, match=r"profile: must hold attention of bf16, fp16 or fp32, got none\. Run"):
        build_profile(empty, None, gpu=select_gpu("h100-sxm"), cluster=select_cluster("dgx-h100"), start=start)


def test_a_benchmark_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_profile, "BENCHMARK_MODULE", "no_such_module")
    match = (
        r"profile: the operators of 1 process\(es\) must run on cpu, got exit code 1: .*no_such_module.*\. "
        r"Check the installation with hammer check-environment\."
    )
    assert sys.executable
    with pytest.raises(PlatformError, match=match):
        time_operators(
            tmp_path / "o.json", platform="cpu", num_processes=1, seconds_per_operator=0.1, precisions=["fp32"]
        )
