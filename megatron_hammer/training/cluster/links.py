"""Times of the collectives of every process group, and of pairs of hosts; every rank runs this, rank 0 judges."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.platforms.device_check import wait_for_device
from megatron_hammer.training.cluster.traffic import Traffic

NUM_BLOCKS = 5
# In a row, so that a short call is not drowned in the wait for the device; a message of BLOCK_BYTES is sent once.
MOST_CALLS_PER_BLOCK, BLOCK_BYTES = 8, 1 << 25
# The first calls of a communicator connect its ranks.
NUM_WARM_UP_CALLS = 2


def build_groups(kinds: Mapping[str, Sequence[tuple[int, ...]]], rank: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """This rank's process group of each kind and its ranks. All ranks make all groups, in the same order."""
    own = {}
    for kind, groups in kinds.items():
        for ranks in groups:
            group = dist.new_group(list(ranks))
            if rank in ranks:
                own[kind] = (group, ranks)
    return own


def time_group(traffic: Traffic, collective: str, group: Any, ranks: Sequence[int], device: Any) -> dict[int, float]:
    """Seconds of one call by message size, on this rank: the fastest of a few blocks of calls in a row.

    Other work on a host makes single blocks slower, and a bad link all of them.
    """
    times_s = {}
    for num_bytes in traffic.sizes:
        call = build_call(collective, num_bytes, group, ranks, device)
        num_calls = max(1, min(MOST_CALLS_PER_BLOCK, BLOCK_BYTES // num_bytes))
        times_s[num_bytes] = _time_blocks(call, num_calls, group, device)
    return times_s


def build_call(collective: str, num_bytes: int, group: Any, ranks: Sequence[int], device: Any) -> Callable[[], Any]:
    """One call of a collective on a message of num_bytes (whole tensor) in fp32, in parts that all ranks share."""
    size = len(ranks)
    count = max(size, num_bytes // 4 // size * size)
    whole = torch.zeros(count, device=device)
    part = torch.zeros(count // size, device=device)
    if collective == "all-reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if collective == "all-gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if collective == "reduce-scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    if collective == "all-to-all":
        received = torch.empty_like(whole)
        return lambda: dist.all_to_all_single(received, whole, group=group)
    # Each stage of a pipeline sends to the next one and receives from the one before, as in the steady state.
    place = list(ranks).index(dist.get_rank())
    received = torch.empty_like(whole)
    return lambda: _exchange(whole, received, ranks[(place + 1) % size], ranks[place - 1], group)


def time_pairs(
    rounds: Sequence[Sequence[tuple[int, int]]], num_bytes: int, device: Any
) -> list[tuple[int, int, float]]:
    """(this rank, partner, bytes per second in each direction) for the pairs that this rank is part of.

    The pairs of a round send at the same time. A rank without a partner in a round starts the next one.
    """
    rank, found = dist.get_rank(), []
    sent, received = (torch.zeros(num_bytes // 4, device=device) for _ in range(2))
    for pairs in rounds:
        partner = next((right if rank == left else left for left, right in pairs if rank in (left, right)), None)
        if partner is None:
            continue
        for _ in range(NUM_WARM_UP_CALLS):
            _exchange(sent, received, partner, partner, None)
        times_s = []
        for _ in range(NUM_BLOCKS):
            wait_for_device(device)
            started_at_s = time.perf_counter()
            _exchange(sent, received, partner, partner, None)
            wait_for_device(device)
            times_s.append(time.perf_counter() - started_at_s)
        found.append((rank, partner, num_bytes / min(times_s)))
    return found


def _exchange(sent: Any, received: Any, target: int, source: int, group: Any) -> None:
    operations = [dist.P2POp(dist.isend, sent, target, group), dist.P2POp(dist.irecv, received, source, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _time_blocks(call: Callable[[], Any], num_calls: int, group: Any, device: Any) -> float:
    for _ in range(NUM_WARM_UP_CALLS):
        call()
    times_s = []
    for _ in range(NUM_BLOCKS):
        # The ranks start together, so that a block does not contain the wait for the slowest of them.
        dist.barrier(group=group)
        wait_for_device(device)
        started_at_s = time.perf_counter()
        for _ in range(num_calls):
            call()
        wait_for_device(device)
        times_s.append((time.perf_counter() - started_at_s) / num_calls)
    return min(times_s)
