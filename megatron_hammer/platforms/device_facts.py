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
