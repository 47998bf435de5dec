"""Facts about the device of this process and the few collectives that report them."""

import resource

import torch


def read_device_name(platform: str) -> str:
    return "CPU process" if platform == "cpu" else torch.cuda.get_device_name()


def read_peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU, or resident (ru_maxrss, KiB on Linux) on the CPU platform."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def max_over_ranks(value: float) -> float:
    """Collective maximum over all ranks; exact for integers below 2**53."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor.item())
