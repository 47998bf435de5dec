"""Estimated memory of each pipeline stage against what a device holds."""

import math
import os

from megatron_hammer.config.run_plan import Machine, RunPlan
from megatron_hammer.model.accounting import StageMemory, estimate_memory
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.memory.estimate import EXPANDABLE_FRAGMENTATION_RATIO, FRAGMENTATION_RATIO
from megatron_hammer.platforms.device import read_device_memory_bytes

ALLOWANCES = ("context", "fragmentation")  # not shown: no flag of the run changes them


def estimate_run_memory(plan: RunPlan) -> tuple[StageMemory, ...]:
    """The peak of each stage; needs a plan whose layout and batch fit.

    A run on this machine's CPU has no CUDA context and no caching allocator; a planned one is planned for GPUs.
    """
    allowances = {"fragmentation_ratio": EXPANDABLE_FRAGMENTATION_RATIO if _is_expandable() else FRAGMENTATION_RATIO}
    if not plan.machine.has_gpu:
        allowances = {"context_bytes": 0, "fragmentation_ratio": 0.0}
    return estimate_memory(
        plan.model,
        plan.layout,
        micro_batch_size=plan.batch.micro_batch_size,
        seq_length=plan.seq_length,
        num_microbatches=plan.num_microbatches,
        options=plan.memory,
        **allowances,  # type: ignore[arg-type]
    )


def _is_expandable() -> bool:
    """Whether the environment switches expandable segments of torch's caching allocator on."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the new name and the old one
    return any("expandable_segments:true" in os.environ.get(name, "").lower() for name in names)


def read_available_bytes(machine: Machine) -> int | None:
    """What one rank may use: --gpu-memory-gib, this machine's GPU, or its share of this machine's memory.

    None for a plan on a machine without a GPU: there is nothing to compare with.
    """
    if machine.gpu_memory_gib is not None and math.isfinite(machine.gpu_memory_gib):
        return round(machine.gpu_memory_gib * GIB)
    if machine.platform == "cpu" and machine.is_planned:
        return None
    total = read_device_memory_bytes(machine.platform)
    # The processes of a node share its memory; a GPU belongs to one process.
    return total if total is None or machine.platform != "cpu" else total // machine.local_world_size


def find_memory_problems(plan: RunPlan) -> list[str]:
    """One problem for the stage that needs most, if it does not fit; needs a layout that holds the model."""
    available = read_available_bytes(plan.machine)
    if available is None:
        return []
    largest = max(estimate_run_memory(plan), key=lambda stage: stage.total_bytes)
    if largest.total_bytes <= available:
        return []
    parts = largest.list_parts()
    shown = (name for name, size in parts.items() if size and name not in ALLOWANCES)
    heaviest = ", ".join(f"{name} {parts[name] / GIB:.1f}" for name in shown)
    return [
        f"memory: the estimate of pipeline stage {largest.pp_rank} must fit in a device, got "
        f"{largest.total_bytes / GIB:.1f} GiB of {available / GIB:.1f} ({heaviest}). {_advise(plan, parts)}."
    ]


def _advise(plan: RunPlan, parts: dict[str, int]) -> str:
    """The cheapest remedy against what weighs most."""
    state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    # Smaller micro-batches reduce only these; weights and optimizer state need more ranks.
    if parts["activations"] + parts["logits"] + parts["transient"] > state:
        if plan.batch.micro_batch_size > 1:
            return f"Pass --micro-batch-size {plan.batch.micro_batch_size // 2}"
        if plan.recompute != "full":
            return "Pass --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    if plan.memory.has_quantized_copies and parts["buffers"] > parts["weights"] / 2:
        flag = "--fp4-param-gather" if plan.memory.precision == "nvfp4" else "--fp8-param-gather"
        return f"Pass {flag}: 16-bit weights are kept beside their quantized copies"
    return "Raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or use more devices"
