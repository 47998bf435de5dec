"""The name and the memory of this process, and the collective that finds the rank with the most memory."""

import resource

import psutil
import pytest
import torch

from megatron_hammer.platforms.device import max_over_ranks, read_device_name, read_peak_memory_bytes


def test_a_cpu_process_is_named_as_such() -> None:
    assert read_device_name("cpu") == "CPU process"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the allocator's peak is read: run without one")
def test_peak_memory_is_the_resident_peak_in_bytes() -> None:
    resident = psutil.Process().memory_info().rss
    peak = read_peak_memory_bytes()
    assert peak == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert resident * 0.9 < peak < psutil.virtual_memory().total  # ru_maxrss is in KiB: bytes would be 1,024 times off


def _find_max(rank: int, store_path: str, values: list[float], results: list) -> None:
    store = torch.distributed.FileStore(store_path, len(values))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(values), store=store)
    results.put(max_over_ranks(values[rank]))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo reduces CPU tensors: run without a GPU")
def test_maximum_over_ranks_is_exact(tmp_path) -> None:
    values = [float(2**53 - 1), 3.0]  # more than fp32 could carry
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_find_max, args=(rank, str(tmp_path / "store"), values, results)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert [results.get(), results.get()] == [2**53 - 1] * 2
    for process in processes:
        process.join(timeout=60)
