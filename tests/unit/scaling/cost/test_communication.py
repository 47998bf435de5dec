"""Collectives: the place of a group, its slowest link, and the time that is not overlapped."""

import dataclasses
import math

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, load_coefficients, replace_values
from megatron_hammer.scaling.cost.communication import (
    NVLS_BANDWIDTH_RATIO,
    PAT_RANK_S,
    Group,
    estimate_all_reduce_s,
    estimate_all_to_all_s,
    estimate_exposed_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
from megatron_hammer.scaling.hardware.catalogue import select_cluster
from megatron_hammer.scaling.plan import Cluster

CLUSTER = Cluster(
    name="test",
    source="invented",
    gpu="test",
    gpus_per_node=8,
    nvlink_domain_size=8,
    nvlink_bytes_per_s=100e9,
    nvlink_latency_s=0.0,
    network_bytes_per_s=10e9,
    network_latency_s=0.0,
    leaf_size=64,
    spine_oversubscription_ratio=2.0,
)
# without loss by chance meetings of flows, which have a test of their own
PERFECT = replace_values(
    build_prior_coefficients(),
    {"nvlink_ratio": 1.0, "network_ratio": 1.0, "collective_s": 1e-12, "hop_ratio": 1.0}
    | {"adaptive_congestion_ratio": 1e-12, "hashed_congestion_ratio": 1e-12},
)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (8, 1, Group(8, 8, 1)),  # tensor ranks of one node
        (16, 1, Group(16, 8, 1)),
        (4, 2, Group(4, 4, 2)),  # context ranks beside tp = 2
        (8, 4, Group(8, 2, 4)),  # data ranks beside tp = 4: two on each of four nodes
        (16, 8, Group(16, 1, 8)),  # one on every node
    ],
)
def test_groups_lie_as_megatron_lays_ranks_out(size, stride, expected):
    assert place_group(size, stride, CLUSTER) == expected


def test_a_gather_inside_a_node_moves_all_but_its_own_part():
    seconds = estimate_gather_s(8e9, place_group(8, 1, CLUSTER), CLUSTER, PERFECT)
    assert seconds == pytest.approx(8e9 * 7 / 8 / 100e9)
    assert estimate_all_reduce_s(8e9, place_group(8, 1, CLUSTER), CLUSTER, PERFECT) == pytest.approx(2 * seconds)


def test_a_ring_over_nodes_is_as_fast_as_the_cards_of_its_ranks_together():
    one_a_node = estimate_gather_s(1e9, Group(4, 1, 8), CLUSTER, PERFECT)
    assert one_a_node == pytest.approx(1e9 * 3 / 4 / 10e9)
    two_a_node = estimate_gather_s(1e9, Group(4, 2, 4), CLUSTER, PERFECT)
    assert two_a_node == pytest.approx(one_a_node / 2)
    # with so many cards that the links inside are slower, these bound it
    wide = dataclasses.replace(CLUSTER, network_bytes_per_s=50e9)
    assert estimate_gather_s(1e9, Group(16, 8, 1), wide, PERFECT) == pytest.approx(1e9 * 15 / 16 / 100e9)


def test_oversubscribed_links_are_shared_by_the_ranks_that_leave_a_leaf_at_once():
    """A ring leaves its leaf once. Groups with a long stride leave it with every rank."""
    inside = estimate_gather_s(1e9, Group(4, 1, 8), CLUSTER, PERFECT)
    consecutive = estimate_gather_s(1e9, Group(4, 1, 32), CLUSTER, PERFECT)  # 32 of 64 ranks leave, over half the links
    assert consecutive == pytest.approx(inside)
    apart = estimate_gather_s(1e9, Group(4, 1, 64), CLUSTER, PERFECT)
    assert apart == pytest.approx(2 * inside)
    pods = dataclasses.replace(CLUSTER, pod_size=128, pod_oversubscription_ratio=7.0)
    assert estimate_gather_s(1e9, Group(4, 1, 128), pods, PERFECT) == pytest.approx(7 * inside)
    assert estimate_gather_s(1e9, Group(2, 1, 64), pods, PERFECT) == pytest.approx(2 * inside * (1 / 2) / (3 / 4))


def test_flows_meet_by_chance_above_the_leaf_and_more_often_where_they_are_hashed():
    crowded = replace_values(PERFECT, {"adaptive_congestion_ratio": 0.05, "hashed_congestion_ratio": 0.2})
    group = Group(16, 1, 8)  # two leaves
    wide = dataclasses.replace(CLUSTER, spine_oversubscription_ratio=1.0)
    alone = estimate_gather_s(1e9, group, wide, PERFECT)
    hashed = dataclasses.replace(wide, routing="hashed")
    assert estimate_gather_s(1e9, group, wide, crowded) == pytest.approx(alone * (1 + 0.05 * math.log(2)))
    assert estimate_gather_s(1e9, group, hashed, crowded) == pytest.approx(alone * (1 + 0.2 * math.log(2)))
    # without known leaves, every node is one of them where flows are hashed
    flat = dataclasses.replace(hashed, leaf_size=0)
    assert estimate_gather_s(1e9, group, flat, crowded) == pytest.approx(alone * (1 + 0.2 * math.log(16)))


def test_a_ring_passes_every_rank_one_after_the_other():
    slow = dataclasses.replace(CLUSTER, network_latency_s=5e-6, nvlink_latency_s=2e-6, leaf_size=0)
    assert estimate_gather_s(8, Group(4, 1, 8), slow, PERFECT) == pytest.approx(3 * 5e-6, rel=1e-3)
    assert estimate_gather_s(8, Group(64, 8, 1), slow, PERFECT) == pytest.approx(7 * 5e-6 + 56 * 2e-6, rel=1e-3)
    twice = replace_values(PERFECT, {"hop_ratio": 2.0})
    assert estimate_gather_s(8, Group(4, 1, 8), slow, twice) == pytest.approx(6 * 5e-6, rel=1e-3)
    messages = estimate_gather_s(8, Group(4, 1, 8), slow, PERFECT, num_messages=5)
    assert messages == pytest.approx(15 * 5e-6, rel=1e-3)


def test_a_gather_of_a_gibibyte_over_16384_gpus_is_longer_than_over_64():
    cluster = select_cluster("dgx-h100")
    times = [estimate_gather_s(2**30, place_group(n, 1, cluster), cluster, load_coefficients()) for n in (64, 16384)]
    assert times[1] > 5 * times[0]


def test_large_groups_take_the_tree_or_pat_where_these_are_faster():
    slow = dataclasses.replace(CLUSTER, network_latency_s=1e-4, leaf_size=0)
    small = estimate_all_reduce_s(8, Group(1024, 1, 8), slow, PERFECT)
    assert small == pytest.approx(2 * 10 * 1e-4, rel=1e-3)  # up and down ten levels
    large = estimate_all_reduce_s(1e12, Group(16, 1, 8), slow, PERFECT)
    assert large == pytest.approx(2 * 1e12 * 15 / 16 / 10e9, rel=1e-2)  # the ring has more bandwidth
    gathered = estimate_gather_s(8, Group(1024, 1, 8), slow, PERFECT)
    assert gathered == pytest.approx(10 * 1e-4 + 1024 * PAT_RANK_S, rel=1e-3)
    # with several ranks on a node, NCCL has the ring only
    assert estimate_gather_s(8, Group(1024, 8, 1), slow, PERFECT) == pytest.approx(127 * 1e-4, rel=1e-3)


def test_switches_that_sum_make_an_all_reduce_faster_and_a_gather_not():
    sums = dataclasses.replace(CLUSTER, has_nvlink_sums=True)
    group = Group(8, 8, 1)
    without = estimate_all_reduce_s(8e9, group, CLUSTER, PERFECT)
    assert estimate_all_reduce_s(8e9, group, sums, PERFECT) == pytest.approx(without / NVLS_BANDWIDTH_RATIO)
    assert estimate_gather_s(8e9, group, sums, PERFECT) == estimate_gather_s(8e9, group, CLUSTER, PERFECT)


def test_all_to_all_keeps_a_part_and_leaves_the_node_with_the_rest():
    inside = estimate_all_to_all_s(8e8, Group(8, 8, 1), CLUSTER, PERFECT)
    assert inside == pytest.approx(8e8 * 7 / 8 / 100e9)
    across = estimate_all_to_all_s(8e8, Group(16, 8, 1), CLUSTER, PERFECT)
    assert across == pytest.approx(8e8 / 2 / 10e9)
    # all ranks of a leaf send to the others at once
    beyond = estimate_all_to_all_s(8e8, Group(128, 8, 1), CLUSTER, PERFECT)
    assert beyond == pytest.approx(8e8 * 120 / 128 / 10e9 * 2)


def test_a_send_leaves_the_node_where_its_group_does():
    assert estimate_send_s(1e8, Group(2, 2, 1), CLUSTER, PERFECT) == pytest.approx(1e-3)
    assert estimate_send_s(1e8, Group(4, 1, 8), CLUSTER, PERFECT) == pytest.approx(1e-2)


def test_a_group_of_one_costs_nothing():
    alone = place_group(1, 1, CLUSTER)
    for estimate in (estimate_gather_s, estimate_all_to_all_s, estimate_send_s, estimate_all_reduce_s):
        assert estimate(1e9, alone, CLUSTER, PERFECT) == 0


@pytest.mark.parametrize(("window_s", "shown_s"), [(0.0, 2.0), (1.5, 0.5), (5.0, 0.2)])
def test_exposed_time_is_the_excess_over_the_overlap_window_with_a_minimum(window_s, shown_s):
    assert estimate_exposed_s(2.0, window_s, 0.1) == pytest.approx(shown_s)
