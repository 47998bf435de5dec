"""Memory that a save takes on each host, beside what training takes there.

For checkpoints that load at any layout (--dist-ckpt-optim-fully-reshardable, our default), megatron-core 0.19 gathers
the optimizer state of a data-parallel group in the host memory of every one of its ranks, however finely the optimizer
is sharded (DistributedOptimizer.get_parameter_state_dp_zero, return_on_all_ranks).
"""

from megatron_hammer.config.preflight.memory import estimate_run_memory
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.platforms.device import read_device_memory_bytes

GATHERED_BYTES = 12  # per parameter of the stage: fp32 weight and two moments


def estimate_host_bytes(plan: RunPlan) -> int:
    """Host memory of all ranks of a node during a save: gathered optimizer states, and the copies that are written.

    On the cpu platform also what training takes. The buffers of one bucket, with which it is gathered, are left out.
    """
    flags, layout, element_bytes = plan.flags, plan.layout, plan.memory.element_bytes
    stages = estimate_run_memory(plan)
    held = max(stage.list_parts()["weights"] for stage in stages) // element_bytes
    num_ranks = plan.machine.local_world_size
    num_gathering = num_ranks if flags["dist_ckpt_optim_fully_reshardable"] and plan.checkpoints.save else 0
    if flags["distrib_optim_fully_reshardable_mem_efficient"]:
        num_gathering = min(num_gathering, layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    copied = (GATHERED_BYTES + element_bytes) * held // max(1, layout.data_parallel_size) if flags["async_save"] else 0
    trained = max(stage.total_bytes for stage in stages) if plan.machine.platform == "cpu" else 0
    return num_gathering * GATHERED_BYTES * held + num_ranks * (copied + trained)


def find_host_memory_problems(plan: RunPlan) -> list[str]:
    """A problem if a save of a run on this machine would take more memory than the machine has."""
    flags, total = plan.flags, read_device_memory_bytes("cpu")
    gathers = flags["use_distributed_optimizer"] and plan.checkpoints.format == "torch_dist"
    if plan.machine.is_planned or plan.checkpoints.save is None or not gathers or total is None:
        return []
    needed = estimate_host_bytes(plan)
    if needed <= total:
        return []
    remedy = "Start fewer processes on each host"
    if not flags["distrib_optim_fully_reshardable_mem_efficient"] and plan.layout.data_parallel_size > 1:
        remedy = "Pass --distrib-optim-fully-reshardable-mem-efficient, with which one rank of each group gathers it"
    return [
        f"save: the optimizer state that a save gathers must fit in the memory of a host, got {needed / GIB:.1f} GiB "
        f"for {plan.machine.local_world_size} processes of {total / GIB:.1f} GiB. {remedy}."
    ]
