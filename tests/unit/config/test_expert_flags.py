import re

import pytest

from megatron_hammer.config.expert_flags import find_expert_problems
from megatron_hammer.config.flags import Flags

SOUND = {
    "num_experts": 8,
    "num_layers": 3,
    "moe_layer_freq": [0, 1, 1],
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
}
EVERY_PROBLEM = {
    "moe_layer_freq": [
        (0, "must be at least 1, got moe_layer_freq=0"),
        ([0, 1], r"must have a number for each layer, got moe_layer_freq=\[0, 1\], num_layers=3"),
        ([0, 0, 0], "must be 0 or 1 for each layer, and 1 for some"),
        ([0, 1, 2], "must be 0 or 1 for each layer"),
    ],
    "moe_router_num_groups": [(3, "must divide num_experts, got num_experts=8, .*moe_router_num_groups=3")],
    "moe_router_group_topk": [
        (-1, "must be at least 1"),
        (5, "at most the groups and the experts of a token, .*moe_router_group_topk=5"),
    ],
    "moe_router_topk": [(1, "experts of a token"), (6, "must fit in the chosen groups, .*moe_router_topk=6")],
    "moe_router_topk_scaling_factor": [(0.0, "finite and above 0"), (-1.0, "factor=-1"), (float("nan"), "factor=nan")],
}


def find(**changes) -> list[str]:
    return find_expert_problems(Flags(values={**SOUND, **changes}, typed=frozenset()))


def test_sound_values_are_none() -> None:
    assert find() == []
    assert find(moe_layer_freq=2, moe_router_num_groups=None, moe_router_topk_scaling_factor=None) == []
    assert find(num_experts=None, moe_layer_freq=0, moe_router_topk_scaling_factor=0.0) == []  # a dense model


@pytest.mark.parametrize("name", EVERY_PROBLEM)
def test_each_wrong_value_is_named(name: str) -> None:
    for value, message in EVERY_PROBLEM[name]:
        (problem,) = find(**{name: value})
        assert re.search(message, problem), problem
