"""Seconds of collectives: message size, group size, and where the ranks of the group lie.

Alpha-beta costs of NCCL's algorithms (Thakur et al. 2005; NCCL's cost model, src/graph/tuning.cc): the ring, whose
latency grows with the number of ranks; for an all-reduce also the double binary tree and, inside a domain of NVSwitches
that sum, NVLS; for gathers with one rank per node also PAT. As NCCL does, the fastest one is taken. Ranks are laid out
as Megatron does, tp-cp-dp-pp from the innermost, so a group is described by its size and its stride. If a group crosses
nodes, all of its ranks in a node send at once, each through its own network card.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.scaling.cost.coefficients import Coefficients
from megatron_hammer.scaling.plan import Cluster

# Bandwidths relative to the ring's, and PAT's latency per rank, from NCCL's cost model.
TREE_BANDWIDTH_RATIO = 0.92
PAT_BANDWIDTH_RATIO = 0.75
PAT_RANK_S = 2.8e-6
# A switch that sums halves what a GPU reads. nccl-tests of eight H100: 480 GB/s of bus bandwidth instead of 370.
NVLS_BANDWIDTH_RATIO = 1.3


class Group(NamedTuple):
    """`size` ranks, `stride` apart, `local_size` of them in each NVLink domain."""

    size: int
    local_size: int
    stride: int

    @property
    def num_domains(self) -> float:
        return self.size / self.local_size

    @property
    def span(self) -> int:
        """Ranks from the first of the group to the last one, at most."""
        return self.size * self.stride


def place_group(size: int, stride: int, cluster: Cluster) -> Group:
    """A group of ranks `stride` apart, the first at the start of a domain."""
    # As many ranks of the group as there are strides in a domain; with a larger stride each rank is in its own domain.
    local_size = max(1, min(size, cluster.nvlink_domain_size // stride))
    return Group(size, local_size, stride)


class Link(NamedTuple):
    """Bandwidth of one rank inside its NVLink domain, and of all ranks of a domain together to other domains."""

    local_bytes_per_s: float
    remote_bytes_per_s: float
    ring_s: float  # latency of one pass around the group
    tree_s: float  # latency of an all-reduce up and down the tree


@lru_cache(maxsize=4096)
def build_link(group: Group, cluster: Cluster, coefficients: Coefficients) -> Link:
    """The links of a group, and the latency of one collective over it.

    The ring passes every rank: num_domains - 1 times between domains, the other times inside them. The cluster's
    latencies are those of a message; a step of a collective also has NCCL's own work (hop_ratio).
    """
    # A ring leaves each leaf once. Ranks of one node, or of one stride, are in different rings and leave it at once.
    num_senders = max(cluster.nvlink_domain_size, group.stride)
    network = cluster.network_bytes_per_s * coefficients.network_ratio
    network /= estimate_contention(group, cluster, coefficients, num_senders)
    domains = group.num_domains
    network_s = coefficients.hop_ratio * cluster.network_latency_s
    nvlink_s = coefficients.hop_ratio * cluster.nvlink_latency_s
    ring_s = (domains - 1) * network_s + (group.size - domains) * nvlink_s
    tree_s = 2.0 * (math.log2(max(1.0, domains)) * network_s + (group.local_size - 1) * nvlink_s)
    return Link(
        cluster.nvlink_bytes_per_s * coefficients.nvlink_ratio,
        group.local_size * network,
        ring_s + coefficients.collective_s,
        tree_s + coefficients.collective_s,
    )


def estimate_contention(
    group: Group, cluster: Cluster, coefficients: Coefficients, num_senders: float = math.inf
) -> float:
    """By how much traffic is slower above leaves and pods than through a network card: 1 for a group under one leaf.

    num_senders: ranks of a leaf that send out of it at once; they share its oversubscribed links. Beyond that, flows
    meet on the same path by chance. The slowest path sets the pace of all, and the expected largest number of flows on
    one of n paths grows about as the logarithm of n. Adaptive routing moves flows away from full paths, hashing (ECMP)
    does not: Gangidi et al. 2024 (RDMA over Ethernet for distributed AI training at Meta scale, SIGCOMM) found up to
    40% between hashing of few and of many flows.
    """
    slowdown = 1.0
    for num_gpus, ratio in (
        (cluster.leaf_size, cluster.spine_oversubscription_ratio),
        (cluster.pod_size, cluster.pod_oversubscription_ratio),
    ):
        if 0 < num_gpus < group.span:
            slowdown = max(slowdown, ratio * min(1.0, num_senders / num_gpus))
    # In a network without leaves, each node has paths of its own if flows are hashed. Otherwise it is perfect.
    is_hashed = cluster.routing == "hashed"
    leaf_size = cluster.leaf_size or (cluster.gpus_per_node if is_hashed else group.span)
    if group.span <= leaf_size or group.num_domains == 1:
        return slowdown
    ratio = coefficients.hashed_congestion_ratio if is_hashed else coefficients.adaptive_congestion_ratio
    return slowdown * (1.0 + ratio * math.log(group.span / leaf_size))


def estimate_gather_s(
    num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients, num_messages: int = 1
) -> float:
    """An all-gather to `num_bytes` on every rank, or a reduce-scatter from it, in equal messages one by one."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    link = build_link(group, cluster, coefficients)
    wire_s = num_bytes * (group.size - 1) / group.size / _find_ring_bandwidth(group, link)
    ring_s = wire_s + num_messages * link.ring_s
    if group.local_size > 1 or group.size == 2:
        return ring_s
    # PAT (NCCL 2.23), a binomial tree for groups with one rank per node: fewer steps of the network, less bandwidth.
    steps_s = math.log2(group.size) * coefficients.hop_ratio * cluster.network_latency_s + group.size * PAT_RANK_S
    return min(ring_s, wire_s / PAT_BANDWIDTH_RATIO + num_messages * (steps_s + coefficients.collective_s))


def estimate_all_reduce_s(
    num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients, num_messages: int = 1
) -> float:
    """The sum of `num_bytes` of every rank, on every rank, in equal messages one by one."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    link = build_link(group, cluster, coefficients)
    bandwidth = _find_ring_bandwidth(group, link)
    wire_s = 2.0 * num_bytes * (group.size - 1) / group.size / bandwidth
    times_s = [wire_s + num_messages * (2.0 * link.ring_s - coefficients.collective_s)]
    if group.num_domains > 1:
        times_s.append(2.0 * num_bytes / (TREE_BANDWIDTH_RATIO * bandwidth) + num_messages * link.tree_s)
    elif cluster.has_nvlink_sums and group.size > 2:
        times_s.append(wire_s / NVLS_BANDWIDTH_RATIO + num_messages * link.tree_s)
    return min(times_s)


def _find_ring_bandwidth(group: Group, link: Link) -> float:
    """Of the slowest link, which sets the pace of a ring."""
    if group.num_domains == 1:
        return link.local_bytes_per_s
    return link.remote_bytes_per_s if group.local_size == 1 else min(link.local_bytes_per_s, link.remote_bytes_per_s)


def estimate_all_to_all_s(num_bytes: float, group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    """Every rank sends `num_bytes` in equal parts to all ranks of the group, itself included."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    link = build_link(group, cluster, coefficients)
    local_s = num_bytes * (group.local_size - 1) / group.size / link.local_bytes_per_s
    remote_share = (group.size - group.local_size) / group.size
    # Every rank sends through its own network card. All ranks of a leaf send to other leaves at once.
    network = cluster.network_bytes_per_s * coefficients.network_ratio
    remote_s = num_bytes * remote_share / network * estimate_contention(group, cluster, coefficients)
    # NVLink and the network are separate wires, so both parts travel at the same time.
    return max(local_s, remote_s) + estimate_farthest_s(group, cluster, coefficients)


def estimate_farthest_s(group: Group, cluster: Cluster, coefficients: Coefficients) -> float:
    """The latency of messages to all ranks of a group that are sent without waiting: that of the farthest one."""
    wire_s = cluster.network_latency_s if group.num_domains > 1 else cluster.nvlink_latency_s
    return coefficients.hop_ratio * wire_s + coefficients.collective_s


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
