"""Memory of plans: the same estimate as preflight's, kept by what it depends on."""

import dataclasses

from megatron_hammer.model.accounting import Layout, estimate_memory
from megatron_hammer.presets import PRESETS
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan
from megatron_hammer.scaling.plan_memory import estimate_plan_memory

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
    layout=Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, data_parallel_size=8),
    gpu=GPU,
    cluster=CLUSTER,
    seq_length=4096,
    micro_batch_size=1,
    global_batch_size=512,
)


def test_a_plan_needs_what_preflight_estimates():
    expected = estimate_memory(PLAN.model, PLAN.layout, micro_batch_size=1, seq_length=4096, num_microbatches=64)
    assert estimate_plan_memory(PLAN) == expected


def test_what_memory_does_not_depend_on_is_answered_from_memory():
    first = estimate_plan_memory(PLAN)
    faster = dataclasses.replace(PLAN, gpu=dataclasses.replace(GPU, name="other"), overlaps_grad_reduce=False)
    larger = dataclasses.replace(PLAN, global_batch_size=1024)
    assert estimate_plan_memory(faster) is first
    assert estimate_plan_memory(larger) is first
    assert estimate_plan_memory(dataclasses.replace(PLAN, micro_batch_size=2)) != first
