"""How fast the device of this process computes, and whether its memory keeps what is written."""

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

CHUNK_BYTES = 1 << 28
NUM_CALLS = 10
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that all products with it differ in the 64 bits of an int64


def select_device(platform: str, local_rank: int) -> torch.device:
    """The device of this process; on cuda, the one that its operations use from here on."""
    if platform == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def wait_for_device(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_uuid(device: torch.device) -> str | None:
    """The GPU's UUID as NVML spells it; None of a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def read_nccl_version() -> str | None:
    """Of the library that PyTorch uses; None where it has none."""
    # torch.cuda.nccl.version() is the version that PyTorch was compiled with; another library may be loaded.
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return None
    code = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(code)) != 0:
        return None
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"


def read_memory_bytes(device: torch.device) -> tuple[int, int]:
    """(free, total) of the GPU, or (available, total) of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def time_products(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """FLOP/s of products [m, k] x [k, n] of these shapes, one after the other; of each the median of several calls."""
    seconds, flops = 0.0, 0.0
    for m, k, n in shapes:
        left, right = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        result = torch.empty(m, n, device=device, dtype=dtype)
        seconds += statistics.median(time_calls(device, functools.partial(torch.mm, left, right, out=result)))
        flops += 2.0 * m * k * n
    return flops / seconds


def time_calls(device: torch.device, call: Callable[[], Any], num_calls: int = NUM_CALLS) -> list[float]:
    """Seconds of each call, after two that are not counted."""
    times_s = []
    for index in range(num_calls + 2):
        wait_for_device(device)
        started_at_s = time.perf_counter()
        call()
        wait_for_device(device)
        if index >= 2:
            times_s.append(max(time.perf_counter() - started_at_s, 1e-9))
    return times_s


def write_pattern(device: torch.device, num_bytes: int, *, is_inverted: bool = False) -> list[torch.Tensor]:
    """Fill num_bytes with numbers that differ from place to place, in chunks that are all held at once."""
    counts = [CHUNK_BYTES // 8] * (num_bytes // CHUNK_BYTES) + [num_bytes % CHUNK_BYTES // 8]
    return [_pattern(device, index, count, is_inverted) for index, count in enumerate(counts) if count]


def count_wrong_words(chunks: Sequence[torch.Tensor], *, is_inverted: bool = False) -> int:
    """64-bit words that no longer hold what write_pattern wrote."""
    return sum(
        int((chunk != _pattern(chunk.device, index, chunk.numel(), is_inverted)).sum())
        for index, chunk in enumerate(chunks)
    )


def find_wrong_words(device: torch.device, num_bytes: int) -> int:
    """Write and read a buffer twice, the second time with every bit inverted, so that each bit was 0 and 1."""
    wrong = 0
    for is_inverted in (False, True):
        wrong += count_wrong_words(write_pattern(device, num_bytes, is_inverted=is_inverted), is_inverted=is_inverted)
    return wrong


def _pattern(device: torch.device, index: int, count: int, is_inverted: bool) -> torch.Tensor:
    start = index * (CHUNK_BYTES // 8)
    words = torch.arange(start, start + count, dtype=torch.int64, device=device).mul_(_FACTOR)
    return words.bitwise_not_() if is_inverted else words
