"""Collectives: the place of a group, its slowest link, and the time that is not overlapped."""

import dataclasses

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, replace_values
from megatron_hammer.scaling.cost.communication import (
    Group,
    estimate_all_reduce_s,
    estimate_all_to_all_s,
    estimate_exposed_s,
    estimate_gather_s,
    estimate_send_s,
    place_group,
)
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
PERFECT = replace_values(build_prior_coefficients(), {"nvlink_ratio": 1.0, "network_ratio": 1.0, "collective_s": 1e-12})


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        (8, 1, Group(8, 8, True)),  # tensor ranks of one node
        (16, 1, Group(16, 8, True)),
        (4, 2, Group(4, 4, True)),  # context ranks beside tp = 2
        (8, 4, Group(8, 2, True)),  # data ranks beside tp = 4: two on each of four nodes
        (16, 8, Group(16, 1, False)),  # one on every node, and beyond the leaf's 64
    ],
)
def test_groups_lie_as_megatron_lays_ranks_out(size, stride, expected):
    assert place_group(size, stride, CLUSTER) == expected


def test_a_gather_inside_a_node_moves_all_but_its_own_part():
    seconds = estimate_gather_s(8e9, place_group(8, 1, CLUSTER), CLUSTER, PERFECT)
    assert seconds == pytest.approx(8e9 * 7 / 8 / 100e9)
    assert estimate_all_reduce_s(8e9, place_group(8, 1, CLUSTER), CLUSTER, PERFECT) == pytest.approx(2 * seconds)


def test_a_ring_over_nodes_is_as_fast_as_the_cards_of_its_ranks_together():
    one_a_node = estimate_gather_s(1e9, Group(4, 1, True), CLUSTER, PERFECT)
    assert one_a_node == pytest.approx(1e9 * 3 / 4 / 10e9)
    two_a_node = estimate_gather_s(1e9, Group(4, 2, True), CLUSTER, PERFECT)
    assert two_a_node == pytest.approx(one_a_node / 2)
    # with so many cards that the links inside are slower, these bound it
    wide = dataclasses.replace(CLUSTER, network_bytes_per_s=50e9)
    assert estimate_gather_s(1e9, Group(16, 8, True), wide, PERFECT) == pytest.approx(1e9 * 15 / 16 / 100e9)


def test_above_the_leaf_oversubscription_halves_the_network():
    under, above = Group(4, 1, True), Group(4, 1, False)
    ratio = estimate_gather_s(1e9, above, CLUSTER, PERFECT) / estimate_gather_s(1e9, under, CLUSTER, PERFECT)
    assert ratio == pytest.approx(2)


def test_small_messages_cost_their_latency_which_grows_slower_than_the_ring():
    slow = dataclasses.replace(CLUSTER, network_latency_s=5e-6, leaf_size=0)
    few = estimate_gather_s(8, Group(4, 1, True), slow, PERFECT)
    many = estimate_gather_s(8, Group(1024, 1, True), slow, PERFECT)
    assert few == pytest.approx(3 * 5e-6, rel=1e-3)
    assert many == pytest.approx(8 * 10 * 5e-6, rel=1e-3)


def test_all_to_all_keeps_a_part_and_leaves_the_node_with_the_rest():
    inside = estimate_all_to_all_s(8e8, Group(8, 8, True), CLUSTER, PERFECT)
    assert inside == pytest.approx(8e8 * 7 / 8 / 100e9)
    across = estimate_all_to_all_s(8e8, Group(16, 8, True), CLUSTER, PERFECT)
    assert across == pytest.approx(8e8 / 2 / 10e9)


def test_a_send_leaves_the_node_where_its_group_does():
    assert estimate_send_s(1e8, Group(2, 2, True), CLUSTER, PERFECT) == pytest.approx(1e-3)
    assert estimate_send_s(1e8, Group(4, 1, True), CLUSTER, PERFECT) == pytest.approx(1e-2)


def test_a_group_of_one_costs_nothing():
    alone = place_group(1, 1, CLUSTER)
    for estimate in (estimate_gather_s, estimate_all_to_all_s, estimate_send_s, estimate_all_reduce_s):
        assert estimate(1e9, alone, CLUSTER, PERFECT) == 0


@pytest.mark.parametrize(("window_s", "shown_s"), [(0.0, 2.0), (1.5, 0.5), (5.0, 0.2)])
def test_exposed_time_is_the_excess_over_the_overlap_window_with_a_minimum(window_s, shown_s):
    assert estimate_exposed_s(2.0, window_s, 0.1) == pytest.approx(shown_s)
