"""Groups of the machine and rounds of pairs; those of a layout: tests/numerics/test_rank_groups_vs_megatron.py."""

import itertools

import pytest

from megatron_hammer.training.cluster.rank_groups import list_machine_groups, list_rounds, name_hosts


def test_groups_of_the_machine() -> None:
    groups = list_machine_groups(["a", "a", "b", "b", "c", "c"])
    assert groups == {"host": [(0, 1), (2, 3), (4, 5)], "network": [(0, 2, 4), (1, 3, 5)]}
    assert list_machine_groups(["a", "b"]) == {"network": [(0, 1)]}
    assert list_machine_groups(["a", "a"]) == {"host": [(0, 1)]}
    assert list_machine_groups(["a", "a", "b"]) == {}


@pytest.mark.parametrize("num_members", [1, 2, 3, 7, 8])
def test_every_pair_meets_once(num_members: int) -> None:
    members = [10 + index for index in range(num_members)]
    rounds = list_rounds(members)
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy))
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert sorted(met) == sorted(itertools.combinations(members, 2))


def test_two_nodes_of_one_name_are_told_apart() -> None:
    assert name_hosts([("a", "0"), ("a", "0"), ("b", "1")]) == ["a", "a", "b"]
    assert name_hosts([("a", "0"), ("a", "1"), ("b", None)]) == ["a (node 0)", "a (node 1)", "b"]
