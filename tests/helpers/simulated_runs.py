"""Measured runs that take exactly what known coefficients say, for tests of fits."""

from dataclasses import dataclass

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import Plan


@dataclass(frozen=True)
class SimulatedRun:
    source: str
    plan: Plan
    step_time_s: float
    fingerprint: str = ""


def simulate_runs(coefficients: Coefficients, source: str = "one") -> list[SimulatedRun]:
    """Nine runs on 64 H100: three models, three layouts; the sequence length belongs to the layout."""
    plans = []
    for name in ("llama3-8b", "llama3-70b", "hammer-1b4"):
        for tp, seq_length in ((1, 2048), (2, 16384), (8, 8192)):
            layout = ParallelLayout(
                tensor_model_parallel_size=tp, data_parallel_size=64 // tp, has_sequence_parallel=tp > 1
            )
            plans.append(
                Plan(
                    model=PRESETS[name].model,
                    layout=layout,
                    gpu=select_gpu("h100-sxm"),
                    cluster=select_cluster("dgx-h100"),
                    seq_length=seq_length,
                    micro_batch_size=1,
                    global_batch_size=128,
                    overlaps_grad_reduce=False,
                )
            )
    return [
        SimulatedRun(source, plan, predict_step(plan, coefficients).total_s, f"{source}-{number}")
        for number, plan in enumerate(plans)
    ]
