"""What a device of this machine holds, for checks before a run; asks and changes nothing."""

import psutil
import torch


def read_device_memory_bytes(platform: str) -> int | None:
    """Memory of one GPU, or of this machine on the cpu platform (shared by its processes); None without a device."""
    if platform == "cpu":
        return psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def read_device_generation() -> int | None:
    """Major compute capability of this machine's GPU (8 Ampere, 9 Hopper, 10 Blackwell); None without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
