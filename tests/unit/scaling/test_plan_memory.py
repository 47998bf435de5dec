"""Memory of plans: the same estimate as preflight's."""

import dataclasses

import pytest

from megatron_hammer.model.accounting import ParallelLayout, StageMemory, estimate_memory
from megatron_hammer.model.memory.estimate import EXPANDABLE_FRAGMENTATION_RATIO
from megatron_hammer.model.memory.options import MemoryOptions
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan
from megatron_hammer.scaling.plan_memory import build_memory_run, estimate_heaviest_plan_stage

GPU = Gpu(
    name="test-gpu",
    source="invented",
    fp32_tflops=10,
    fp16_tflops=20,
    bf16_tflops=20,
    fp8_tflops=40,
    fp4_tflops=None,
    memory_bytes=80 * 2**30,
    memory_bytes_per_s=1e12,
    power_w=100,
)
CLUSTER = Cluster(
    name="test-cluster",
    source="invented",
    gpu="test-gpu",
    gpus_per_node=8,
    nvlink_domain_size=8,
    nvlink_bytes_per_s=1e11,
    nvlink_latency_s=1e-6,
    network_bytes_per_s=1e10,
    network_latency_s=1e-5,
)
PLAN = Plan(
    model=PRESETS["llama2-7b"].model,
    layout=ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, data_parallel_size=8),
    gpu=GPU,
    cluster=CLUSTER,
    seq_length=4096,
    micro_batch_size=1,
    global_batch_size=512,
)


def estimate_plan_memory(plan: Plan) -> tuple[StageMemory, ...]:
    """Every stage of a plan."""
    return estimate_memory(plan.model, plan.layout, **build_memory_run(plan))


def test_a_plan_needs_what_preflight_estimates():
    options = MemoryOptions(cross_entropy="in-place")
    expected = estimate_memory(
        PLAN.model,
        PLAN.layout,
        micro_batch_size=1,
        seq_length=4096,
        num_microbatches=64,
        options=options,
        fragmentation_ratio=EXPANDABLE_FRAGMENTATION_RATIO,
    )
    assert estimate_plan_memory(PLAN) == expected


def test_options_without_effect_on_memory_change_nothing():
    first = estimate_plan_memory(PLAN)
    faster = dataclasses.replace(PLAN, gpu=dataclasses.replace(GPU, name="other"), overlaps_grad_reduce=False)
    assert estimate_plan_memory(faster) == first
    assert estimate_plan_memory(dataclasses.replace(PLAN, global_batch_size=1024)) == first  # more micro-batches
    assert estimate_plan_memory(dataclasses.replace(PLAN, micro_batch_size=2)) != first


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_heaviest_stage_is_one_of_all(recompute, micro_batch_size):
    plan = dataclasses.replace(PLAN, recompute=recompute, micro_batch_size=micro_batch_size)
    stages = estimate_plan_memory(plan)
    assert estimate_heaviest_plan_stage(plan) == max(stages, key=lambda stage: stage.total_bytes)


def test_sharding_divides_the_state():
    def estimate(sharding, shard_size=None):
        return estimate_plan_memory(dataclasses.replace(PLAN, sharding=sharding, shard_size=shard_size))[1]

    whole, optimizer, all_of_it = estimate("none"), estimate("distributed_optimizer"), estimate("fsdp")
    assert 8 * optimizer.optimizer_bytes == pytest.approx(whole.optimizer_bytes, rel=1e-6)
    assert (optimizer.weights_bytes, optimizer.gradients_bytes) == (whole.weights_bytes, whole.gradients_bytes)
    assert 8 * all_of_it.state_bytes == pytest.approx(whole.state_bytes, rel=1e-6)
    assert all_of_it.buffers_bytes > whole.buffers_bytes  # layers are gathered to be used
    assert 2 * estimate("fsdp", shard_size=2).state_bytes == pytest.approx(whole.state_bytes, rel=1e-6)


def test_precision_reaches_the_estimate():
    bf16, fp8 = (estimate_plan_memory(dataclasses.replace(PLAN, precision=name))[0] for name in ("bf16", "fp8"))
    assert fp8.activations_bytes < bf16.activations_bytes  # inputs of linears are kept in 8 bits
    assert fp8.buffers_bytes > bf16.buffers_bytes  # 8-bit copies of the weights
    assert estimate_plan_memory(dataclasses.replace(PLAN, precision="fp16"))[0] == bf16


def test_processes_on_cpus_need_nothing_that_only_gpus_have():
    host = dataclasses.replace(PLAN, cluster=dataclasses.replace(CLUSTER, full_speed_processes_per_node=2))
    for gpu, cpu in zip(estimate_plan_memory(PLAN), estimate_plan_memory(host), strict=True):
        assert (cpu.context_bytes, cpu.fragmentation_bytes, cpu.buffers_bytes) == (0, 0, 0)
        assert gpu.buffers_bytes > 0
        assert cpu.state_bytes == gpu.state_bytes
    assert estimate_heaviest_plan_stage(host).total_bytes == max(
        stage.allocated_bytes for stage in estimate_plan_memory(host)
    )
