"""Steps of CPU processes that share cores, against a simulation of their schedule under processor sharing.

The simulation knows nothing of the model's formulas: every process works through its passes in 1F1B order, a pass waits
for the one that it needs, and all that can run share the cores equally.
"""

from dataclasses import replace

import pytest

from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.measured.sweep import parse_layout
from megatron_hammer.scaling.plan import Plan, StepTime

NUM_CORES = 2
# Measured differences are up to 9 %: the formula knows means of stages, the simulation which of them work at once.
TOLERANCE_RATIO = 0.15


def simulate_s(stages_s: list[float], *, num_microbatches: int, num_replicas: int, num_cores: int) -> float:
    """Seconds until every stage of every replica has done its passes; stages_s: of one micro-batch, both passes."""
    pp = len(stages_s)
    waiting = {
        (replica, stage): list_passes(pp - stage - 1, num_microbatches)
        for replica in range(num_replicas)
        for stage in range(pp)
    }
    done: set[tuple[int, int, str, int]] = set()
    running: dict[tuple[int, int], float] = {}
    now_s = 0.0
    while True:
        for (replica, stage), passes in waiting.items():
            if passes and (replica, stage) not in running:
                kind, number = passes[0]
                neighbour = stage - 1 if kind == "forward" else stage + 1
                if neighbour in (-1, pp) or (replica, neighbour, kind, number) in done:
                    running[replica, stage] = stages_s[stage] * (1 if kind == "forward" else 2) / 3
        if not running:
            assert not any(waiting.values())
            return now_s
        speed = min(1.0, num_cores / len(running))
        passed_s = min(running.values()) / speed
        now_s += passed_s
        for place in list(running):
            running[place] -= passed_s * speed
            if running[place] < 1e-12:
                del running[place]
                done.add((*place, *waiting[place].pop(0)))


def list_passes(num_stages_behind: int, num_microbatches: int) -> list[tuple[str, int]]:
    """1F1B: forward passes to fill the stages behind, then one of each, then the backward passes that are left."""
    warmup = min(num_stages_behind, num_microbatches)
    passes = [("forward", number) for number in range(warmup)]
    for number in range(num_microbatches):
        if warmup + number < num_microbatches:
            passes.append(("forward", warmup + number))
        passes.append(("backward", number))
    return passes


def build_plan(layout: str, global_batch_size: int) -> Plan:
    """hammer-tiny on a host of NUM_CORES cores whose messages cost nothing, so that only the schedule is compared."""
    cluster = replace(
        select_cluster("cpu-host"), nvlink_bytes_per_s=1e15, nvlink_latency_s=0.0,
        full_speed_processes_per_node=NUM_CORES,
    )  # fmt: skip
    return Plan(
        model=PRESETS["hammer-tiny"].model, layout=parse_layout(layout), gpu=select_gpu("cpu-core"), cluster=cluster,
        seq_length=256, micro_batch_size=2, global_batch_size=global_batch_size, precision="fp32",
        overlaps_grad_reduce=False, overlaps_param_gather=False,
    )  # fmt: skip


def list_stages_s(single: StepTime, pp: int, num_microbatches: int) -> list[float]:
    """Seconds of a micro-batch on each stage, from the prediction for one process: equal layers, the head last."""
    ends_s = single.embedding_and_loss_s / num_microbatches
    layers_s = (single.matmul_s + single.attention_s + single.pointwise_s) / num_microbatches
    return [layers_s / pp] * (pp - 1) + [layers_s / pp + ends_s]


@pytest.mark.parametrize("layout, global_batch_size", [("pp4", 8), ("pp4", 16), ("pp2-dp2", 8), ("pp2-dp2", 32)])
def test_pipelines_on_shared_cores(layout: str, global_batch_size: int) -> None:
    coefficients = replace(load_coefficients(), collective_s=1e-9, step_s=1e-9)
    plan = build_plan(layout, global_batch_size)
    pp, dp = plan.layout.pipeline_model_parallel_size, plan.layout.data_parallel_size
    single = predict_step(build_plan("single", global_batch_size // dp), coefficients)
    stages_s = list_stages_s(single, pp, plan.num_microbatches)
    simulated_s = simulate_s(stages_s, num_microbatches=plan.num_microbatches, num_replicas=dp, num_cores=NUM_CORES)
    predicted = predict_step(plan, coefficients)
    share = simulated_s / (sum(stages_s) * plan.num_microbatches * dp / NUM_CORES)
    assert share >= 1.0 - 1e-9  # no schedule beats all cores working all the time
    # What the simulation leaves out: gaps between operators, and the optimizer.
    work_s = predicted.total_s - predicted.overhead_s - predicted.optimizer_s
    assert work_s == pytest.approx(simulated_s, rel=TOLERANCE_RATIO)


def test_replicas_take_turns() -> None:
    """Four processes that never wait take twice the time of two on two cores; the simulation agrees exactly."""
    assert simulate_s([3.0], num_microbatches=5, num_replicas=4, num_cores=2) == pytest.approx(30.0)
    assert simulate_s([3.0], num_microbatches=5, num_replicas=4, num_cores=8) == pytest.approx(15.0)
    assert simulate_s([1.0, 1.0], num_microbatches=4, num_replicas=1, num_cores=2) == pytest.approx(5.0)


def test_a_wrong_sharing_is_noticed() -> None:
    """Without sharing, or with every process as busy as the slowest stage, the difference is beyond the tolerance."""
    stages_s = [0.2, 0.2, 0.2, 0.4]
    simulated_s = simulate_s(stages_s, num_microbatches=8, num_replicas=1, num_cores=2)
    slowest_everywhere_s = 4 / 2 * 8 * max(stages_s)
    assert slowest_everywhere_s > (1 + TOLERANCE_RATIO) * simulated_s
    replicas_s = simulate_s([0.2, 0.2], num_microbatches=8, num_replicas=2, num_cores=2)
    unshared_s = simulate_s([0.2, 0.2], num_microbatches=8, num_replicas=2, num_cores=4)
    assert unshared_s < (1 - TOLERANCE_RATIO) * replicas_s
