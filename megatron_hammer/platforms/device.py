"""Facts about the device of this process, before and during a run, and the few collectives that report them."""

import os
import resource
import socket
from collections.abc import Sequence

import psutil
import torch

from megatron_hammer.platforms.agreement import gather_from_ranks


def read_device_name(platform: str) -> str:
    return "CPU process" if platform == "cpu" else torch.cuda.get_device_name()


def read_device_memory_bytes(platform: str) -> int | None:
    """Memory of one GPU, or of this machine on the cpu platform (shared by its processes); None without a device."""
    if platform == "cpu":
        return psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def count_devices() -> int:
    """GPUs that this process sees; CUDA_VISIBLE_DEVICES may hide some of the machine's."""
    return torch.cuda.device_count()


def read_peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU, or resident (ru_maxrss, KiB on Linux) on the CPU platform."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_over_ranks(value: float) -> float:
    """Collective maximum over all ranks; exact for integers below 2**53."""
    # NCCL reduces only tensors on a GPU, gloo those on the CPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor.item())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Collective sum of a small int64 tensor of the host over all ranks."""
    # A copy also on the CPU, because all_reduce works in place on the caller's tensor.
    tensor = values.to("cuda" if torch.cuda.is_available() else "cpu", copy=True)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu()


def gather_lines(lines: Sequence[str]) -> list[str]:
    """Collective list of every rank's lines, each once, in the order of the ranks."""
    return list(dict.fromkeys(line for of_rank in gather_from_ranks(list(lines)) for line in of_rank))


def use_own_device(platform: str, local_rank: int) -> None:
    """Let this process use the GPU of its number on this node; without effect on the cpu platform."""
    if platform == "cuda":
        torch.cuda.set_device(local_rank)


def stand_alone() -> None:
    """Where no launcher started this process, set what a launcher would set: it is rank 0 of 1, and its own master."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        # Port 0 lets the system choose a free one, so that several runs on one machine do not collide.
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
