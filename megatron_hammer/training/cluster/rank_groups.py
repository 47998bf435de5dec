"""Which ranks form the process groups of a layout, as Megatron builds them, and rounds of pairs. Pure.

tests/numerics/test_rank_groups_vs_megatron.py compares the groups with megatron.core.parallel_state.
"""

from collections.abc import Sequence

from megatron_hammer.model.layout import ParallelLayout, RankCoordinates

# The coordinates that the ranks of one group share.
_FIXED = {
    "tensor": ("cp_rank", "dp_rank", "pp_rank"),
    "context": ("tp_rank", "dp_rank", "pp_rank"),
    # Gradients are reduced over data and context ranks together.
    "data": ("tp_rank", "pp_rank"),
    "pipeline": ("tp_rank", "cp_rank", "dp_rank"),
    "expert": ("expert_tp_rank", "expert_dp_rank", "pp_rank"),
}


def list_groups(layout: ParallelLayout) -> dict[str, list[tuple[int, ...]]]:
    """The groups of each kind that have more than one rank: tensor, context, data, pipeline, expert."""
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]
    kinds = {kind: _group_by(coordinates, fixed) for kind, fixed in _FIXED.items()}
    return {kind: groups for kind, groups in kinds.items() if len(groups[0]) > 1}


def list_machine_groups(hosts: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """The ranks of each host, and those of equal position on every host, which share the network. hosts: by rank.

    Without hosts of equal size there is no group across them, since somebody would be left out.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    members = list(list_ranks_of_hosts(hosts).values())
    if all(len(ranks) > 1 for ranks in members):
        found["host"] = [tuple(ranks) for ranks in members]
    if len(members) > 1 and len({len(ranks) for ranks in members}) == 1:
        found["network"] = [tuple(ranks) for ranks in zip(*members, strict=True)]
    return found


def list_ranks_of_hosts(hosts: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of each host, in the order of their first ranks. hosts: by rank."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return found


def list_rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which each member has one partner at most (the circle method)."""
    ring: list[int | None] = [*members] if len(members) % 2 == 0 else [*members, None]
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append([(left, right) for left, right in pairs if left is not None and right is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _group_by(coordinates: list[RankCoordinates], fixed: tuple[str, ...]) -> list[tuple[int, ...]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(coordinates):
        groups.setdefault(tuple(getattr(place, name) for name in fixed), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def name_hosts(answers: Sequence[tuple[str, str | None]]) -> list[str]:
    """A name for each rank's host; the launcher's number of the node is added where two nodes have one name."""
    nodes_of: dict[str, set[str | None]] = {}
    for host, node in answers:
        nodes_of.setdefault(host, set()).add(node)
    return [host if len(nodes_of[host]) == 1 else f"{host} (node {node})" for host, node in answers]
