"""The schedule's formula against a simulation of it, and the kinds of stages against the split."""

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.scaling.cost.pipeline import StageKind, build_schedule, list_stages


def simulate_one_forward_one_backward(forward_s: list[float], backward_s: list[float], num_microbatches: int) -> float:
    """Seconds until the last backward pass of stage 0, every stage running Megatron's order of 1F1B passes."""
    num_stages = len(forward_s)
    orders = []
    for stage in range(num_stages):
        warmup = min(num_stages - stage - 1, num_microbatches)
        order = [("f", i) for i in range(warmup)]
        for i in range(num_microbatches - warmup):
            order += [("f", warmup + i), ("b", i)]
        order += [("b", i) for i in range(num_microbatches - warmup, num_microbatches)]
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * num_stages, [0] * num_stages
    while any(place < len(order) for place, order in zip(position, orders, strict=True)):
        for stage in range(num_stages):
            if position[stage] == len(orders[stage]):
                continue
            kind, index = orders[stage][position[stage]]
            neighbour = stage - 1 if kind == "f" else stage + 1
            ready = 0.0
            if 0 <= neighbour < num_stages:
                if (kind, neighbour, index) not in done:
                    continue
                ready = done[kind, neighbour, index]
            clock[stage] = max(clock[stage], ready) + (forward_s if kind == "f" else backward_s)[stage]
            done[kind, stage, index] = clock[stage]
            position[stage] += 1
    return max(clock)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 3), (2, 2), (4, 7), (4, 16), (8, 8)])
def test_even_stages_take_what_a_simulation_takes(num_stages, num_microbatches):
    simulated = simulate_one_forward_one_backward([1.0] * num_stages, [2.0] * num_stages, num_microbatches)
    schedule = build_schedule([3.0], [num_stages], 1)
    assert num_microbatches * 3.0 + schedule.bubble_s == pytest.approx(simulated)


@pytest.mark.parametrize("slow", [0, 2, 3])
def test_a_slow_stage_sets_the_pace(slow):
    forward, backward = [1.0] * 4, [2.0] * 4
    forward[slow], backward[slow] = 1.3, 2.6
    simulated = simulate_one_forward_one_backward(forward, backward, 24)
    schedule = build_schedule([3.0, 3.9], [3, 1], 1)
    assert schedule.slowest == 1
    assert schedule.imbalance_s == pytest.approx(3.9 - (3 * 3.0 + 3.9) / 4)
    assert 24 * 3.9 + schedule.bubble_s == pytest.approx(simulated, rel=0.03)


def test_chunks_divide_the_filling():
    assert build_schedule([3.0], [8], 4).bubble_s == pytest.approx(build_schedule([3.0], [8], 1).bubble_s / 4)


def test_stages_alike_are_one_kind():
    assert list_stages(24, 4, 2, None, None, False, False) == (
        StageKind(6, True, False, 1),
        StageKind(6, False, False, 2),
        StageKind(6, False, True, 1),
    )
    assert list_stages(24, 1, 1, None, None, False, False) == (StageKind(24, True, True, 1),)
    assert list_stages(126, 8, 8, None, None, True, True) == (
        StageKind(15, True, False, 1),
        StageKind(16, False, False, 6),
        StageKind(15, False, True, 1),
    )


def test_a_split_that_does_not_come_out_is_refused():
    with pytest.raises(ConfigError, match="pipeline-model-parallel-size: must divide num_layers, got pp=5"):
        list_stages(24, 5, 1, None, None, False, False)


def test_stages_of_layers_of_several_kinds():
    """Three dense layers first and a layer for a further token last, as in DeepSeek-V3."""
    kinds = (0, 0, 0, *[1] * 9)
    stages = list_stages(12, 3, 1, None, None, False, False, None, kinds, 1)
    assert stages == (
        StageKind(4, True, False, 1, (3, 1)),
        StageKind(4, False, False, 1, (0, 4)),
        StageKind(5, False, True, 1, (0, 5)),
    )
