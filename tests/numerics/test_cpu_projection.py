"""Steps of four CPU processes, predicted from what one and two processes took: recorded measurements, no clock.

Recorded on 2026-11-21 on two cores of an AMD EPYC (Zen 4) that did other work too, with hammer-tiny in fp32,
micro-batch 2, sequences of 256: the fastest call of each operator and the fastest of each run's steps.
benchmarks/scaling_cpu.py measures the same anew.
"""

from dataclasses import dataclass, replace

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.calibration import fit
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.measured.operator_profile import HostProfile, OperatorReport, Timing, build_profile
from megatron_hammer.scaling.measured.sweep import parse_layout
from megatron_hammer.scaling.plan import Plan

TOLERANCE_RATIO = 0.2
NUM_CORES = 2
# Products [m, k] x [k, n]: seconds.
GEMMS_S = {
    (128, 128, 128): 4.348e-05, (256, 256, 256): 3.246e-04, (512, 512, 512): 2.562e-03, (1024, 1024, 1024): 2.155e-02,
    (512, 256, 320): 8.026e-04, (512, 256, 256): 6.433e-04, (512, 256, 1408): 3.513e-03, (512, 704, 256): 1.764e-03,
    (512, 256, 4096): 1.135e-02, (704, 512, 256): 1.762e-03, (512, 1024, 5632): 6.263e-02, (512, 2816, 1024): 2.982e-02,
}  # fmt: skip
# Sequence length of two samples of 16 heads, 16 wide: seconds of both passes.
ATTENTION_S = {256: 8.633e-03, 512: 3.834e-02, 1024: 1.163e-01}
# Operator: (bytes, seconds).
POINTWISE = {
    "copy": (16_777_216, 2.896e-04), "add": (25_165_824, 4.735e-04), "rms_norm": (16_777_216, 2.066e-03),
    "swiglu": (41_943_040, 1.812e-03), "cross_entropy_with_backward": (33_554_432, 2.985e-03),
    "adam": (117_440_512, 2.441e-03),
}  # fmt: skip
# Bytes: seconds of an all-gather and of a reduce-scatter over two processes.
GATHERS_S = {
    1024: (2.693e-04, 3.380e-04), 4096: (1.731e-04, 1.615e-04), 2**20: (2.528e-04, 7.425e-04),
    2**22: (1.913e-03, 4.155e-03), 2**24: (1.251e-02, 2.443e-02),
}  # fmt: skip
# (layout, global batch): seconds of a step.
ONE_AND_TWO_PROCESSES_S = {
    ("single", 8): 0.783, ("tp2", 8): 0.656, ("pp2", 8): 0.601, ("dp2", 8): 0.463,
    ("single", 16): 1.571, ("tp2", 16): 1.347, ("pp2", 16): 1.121,
}  # fmt: skip
# ParallelLayout, at global batch 8: seconds of a step.
FOUR_PROCESSES_S = {"tp2-pp2": 0.752, "dp4": 0.490, "tp2-dp2": 0.681, "pp2-dp2": 0.505, "pp4": 0.590}


@dataclass(frozen=True)
class RecordedRun:
    plan: Plan
    step_time_s: float
    source: str = "recorded"


def build_timing(
    operator: str, shape: tuple[int, ...], seconds: float, *, flops: float = 0.0, num_bytes: float = 0.0
) -> Timing:
    return Timing(
        operator=operator, shape=shape, dtype="fp32", seconds=seconds, median_s=seconds, fastest_s=seconds,
        flops=flops,
        num_bytes=num_bytes,
    )  # fmt: skip


def build_report(num_processes: int, timings: list[Timing]) -> OperatorReport:
    return OperatorReport(
        device_name="CPU process", platform="cpu", num_processes=num_processes, num_threads=1, num_cores=NUM_CORES,
        num_multiprocessors=1, memory_bytes=25_276_502_016, timings=tuple(timings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile() -> HostProfile:
    alone = [build_timing("gemm", (m, k, n), s, flops=2 * m * k * n) for (m, k, n), s in GEMMS_S.items()]
    alone += [
        build_timing("attention_with_backward", (2, 16, length, 16), seconds, flops=3.5 * 4 * 16 * length**2 * 16)
        for length, seconds in ATTENTION_S.items()
    ]
    alone += [build_timing(name, (1,), seconds, num_bytes=size) for name, (size, seconds) in POINTWISE.items()]
    together = [
        build_timing(name, (size // 4,), seconds, num_bytes=size)
        for size, both_s in GATHERS_S.items()
        for name, seconds in zip(("all_gather", "reduce_scatter"), both_s, strict=True)
    ]
    return build_profile(
        build_report(1, alone), build_report(2, together), gpu=select_gpu("cpu-core"),
        cluster=select_cluster("cpu-host"), start=load_coefficients(),
    )  # fmt: skip


def build_plan(profile: HostProfile, layout: str, global_batch_size: int) -> Plan:
    return Plan(
        model=PRESETS["hammer-tiny"].model, layout=parse_layout(layout), gpu=profile.gpu, cluster=profile.cluster,
        seq_length=256, micro_batch_size=2, global_batch_size=global_batch_size, precision="fp32",
        overlaps_grad_reduce=False, overlaps_param_gather=False,
    )  # fmt: skip


def test_the_profile_alone_knows_one_process(profile: HostProfile) -> None:
    plan = build_plan(profile, "single", 8)
    measured_s = ONE_AND_TWO_PROCESSES_S["single", 8]
    assert predict_step(plan, profile.coefficients).total_s == pytest.approx(measured_s, rel=TOLERANCE_RATIO)


def test_four_processes_from_one_and_two(profile: HostProfile) -> None:
    """The claim itself, on recorded steps: two cores, calibrated on one and two processes, four predicted."""
    runs = [RecordedRun(build_plan(profile, *key), step_time_s) for key, step_time_s in ONE_AND_TWO_PROCESSES_S.items()]
    coefficients = fit(runs, profile.coefficients, is_prior_start=True)
    for run in runs:
        fitted_s = predict_step(run.plan, coefficients).total_s
        assert fitted_s == pytest.approx(run.step_time_s, rel=TOLERANCE_RATIO)
    predicted_s = {
        layout: predict_step(build_plan(profile, layout, 8), coefficients).total_s for layout in FOUR_PROCESSES_S
    }
    assert predicted_s == pytest.approx(FOUR_PROCESSES_S, rel=TOLERANCE_RATIO)


def test_without_sharing_the_cores_the_claim_fails(profile: HostProfile) -> None:
    """The twin: on four cores the same layouts would be much faster than they were on two."""
    cluster = replace(profile.cluster, full_speed_processes_per_node=4)
    for layout, measured_s in FOUR_PROCESSES_S.items():
        plan = replace(build_plan(profile, layout, 8), cluster=cluster)
        if layout != "pp4":  # whose processes wait for one another, whatever the cores
            assert predict_step(plan, profile.coefficients).total_s < (1 - TOLERANCE_RATIO) * measured_s
