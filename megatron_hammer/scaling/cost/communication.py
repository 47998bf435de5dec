"""Seconds of collectives: message size, group size, and where the ranks of the group lie.

Alpha-beta costs of rings (Thakur et al. 2005; NCCL's ring and tree algorithms): a reduce-scatter or all-gather of B
bytes over n ranks moves B * (n - 1) / n through every link, an all-reduce twice that. Ranks are laid out as Megatron
does, tp-cp-dp-pp from the innermost, so a group is described by its size and its stride. If a group crosses nodes, all
of its ranks in a node send at once, each through its own network card.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.plan import Cluster


class Group(NamedTuple):
    """`size` ranks, `local_size` of them in each NVLink domain; is_under_leaf: no link goes above a leaf switch."""

    size: int
    local_size: int
    is_under_leaf: bool

    @property
    def num_domains(self) -> float:
        return self.size / self.local_size


def place_group(size: int, stride: int, cluster: Cluster) -> Group:
    """A group of ranks `stride` apart, the first at the start of a domain."""
    # As many ranks of the group as there are strides in a domain; with a larger stride each rank is in its own domain.
    local_size = max(1, min(size, cluster.nvlink_domain_size // stride))
    # From its first rank to its last, the group spans size * stride ranks at most.
    is_under_leaf = cluster.leaf_size == 0 or size * stride <= cluster.leaf_size
    return Group(size, local_size, is_under_leaf)


class Link(NamedTuple):
    """Bandwidth of one rank inside its NVLink domain, and of all ranks of a domain together to other domains."""

    local_bytes_per_s: float
    remote_bytes_per_s: float
    latency_s: float  # of one pass around the group


@lru_cache(maxsize=4096)
def build_link(group: Group, cluster: Cluster, coefficients: Coefficients) -> Link:
    """The links of a group. Above a leaf switch, the network has its bandwidth divided by the oversubscription."""
    oversubscription = 1.0 if group.is_under_leaf else cluster.spine_oversubscription_ratio
    network = cluster.network_bytes_per_s * coefficients.network_ratio / oversubscription
    hops = group.num_domains - 1
    # A ring visits every domain, so its latency grows linearly. For large groups NCCL switches to trees (all-reduce) or
    # PAT (NCCL 2.23), whose latency is logarithmic.
    remote_steps = min(hops, 8 * math.log2(max(2.0, group.num_domains)))
    latency_s = (group.local_size - 1) * cluster.nvlink_latency_s + remote_steps * cluster.network_latency_s
    return Link(
        cluster.nvlink_bytes_per_s * coefficients.nvlink_ratio,
        group.local_size * network,
        latency_s + coefficients.collective_s,
    )


def estimate_gather_s(num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    """An all-gather to `num_bytes` on every rank, or a reduce-scatter from it."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    link = build_link(group, cluster, coefficients)
    bandwidth = link.local_bytes_per_s if group.local_size > 1 else link.remote_bytes_per_s
    if group.num_domains > 1:  # the slowest link sets the pace of a ring
        bandwidth = min(bandwidth, link.remote_bytes_per_s)
    return num_bytes * (group.size - 1) / group.size / bandwidth + link.latency_s


def estimate_all_reduce_s(num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    return 2.0 * estimate_gather_s(num_bytes, group, cluster, coefficients)


def estimate_all_to_all_s(num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    """Every rank sends `num_bytes` in equal parts to all ranks of the group, itself included."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    link = build_link(group, cluster, coefficients)
    local_s = num_bytes * (group.local_size - 1) / group.size / link.local_bytes_per_s
    remote_share = (group.size - group.local_size) / group.size
    # The remote bandwidth is that of all ranks of a domain; here each rank sends through its own network card.
    remote_s = num_bytes * remote_share / (link.remote_bytes_per_s / group.local_size)
    # NVLink and the network are separate wires, so both parts travel at the same time.
    return max(local_s, remote_s) + link.latency_s


def estimate_send_s(num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    """From one rank to the next of its group; over the network as soon as the group crosses domains."""
    if group.size == 1:
        return 0.0
    link = build_link(group, cluster, coefficients)
    if group.num_domains > 1:
        bandwidth, wire_s = link.remote_bytes_per_s / group.local_size, cluster.network_latency_s
    else:
        bandwidth, wire_s = link.local_bytes_per_s, cluster.nvlink_latency_s
    return num_bytes / bandwidth + wire_s + coefficients.collective_s


def estimate_exposed_s(communication_s: float, window_s: float, least_ratio: float) -> float:
    """The part of overlapped communication that is not hidden by `window_s` of work, at least `least_ratio` of it.

    Overlap is never perfect: communication kernels take multiprocessors and memory bandwidth from the work.
    """
    return max(least_ratio * communication_s, communication_s - window_s)
