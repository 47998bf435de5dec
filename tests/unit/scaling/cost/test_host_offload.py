"""What a step waits for the host: activations longer on their way than a pass, and an optimizer that runs there."""

import dataclasses

import pytest

from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.cost.host_offload import estimate_host_optimizer_s
from megatron_hammer.scaling.cost.step_time import predict_step
from tests.helpers.toy_study import build_llama_plan

PLAN = build_llama_plan()
PRIORS = build_prior_coefficients()
LINK, MEMORY = PLAN.cluster.host_bytes_per_s, PLAN.cluster.host_memory_bytes_per_s


def predict(**changes):
    plan = dataclasses.replace(PLAN, **{name: value for name, value in changes.items() if name != "link"})
    if "link" in changes:
        plan = dataclasses.replace(plan, cluster=dataclasses.replace(plan.cluster, host_bytes_per_s=changes["link"]))
    return predict_step(plan, PRIORS)


def test_a_fast_link_hides_what_a_slow_one_shows():
    modules = {"offload_modules": ("core_attn", "attn_proj", "mlp_norm")}
    plain = predict()
    assert predict(**modules, link=1e15).total_s == pytest.approx(plain.total_s)
    slow, slower = predict(**modules, link=5e9), predict(**modules, link=2.5e9)
    assert plain.total_s < slow.total_s < slower.total_s
    assert slow.overhead_s > plain.overhead_s
    # Bytes per token of one layer: q, k, v, attention's output, the input of the norm.
    moved = 8192 * 2 * (4096 + 2 * 1024 + 4096 + 4096)
    # Once the link is the longer one, each of the 16 micro-batches waits for it in both passes of all layers.
    waited = slower.total_s - slow.total_s
    assert waited == pytest.approx(16 * 32 * 2 * moved * (1 / 2.5e9 - 1 / 5e9), rel=1e-3)


def test_whole_layers_travel_beside_all_passes():
    few, many = predict(num_offloaded_layers=8, link=8e9), predict(num_offloaded_layers=24, link=8e9)
    assert predict().total_s <= few.total_s < many.total_s


def test_the_optimizer_on_the_host_takes_its_memory_or_the_link():
    number = 1e9
    assert estimate_host_optimizer_s(number, PLAN.cluster) == pytest.approx(28 * number / MEMORY)
    narrow = dataclasses.replace(PLAN.cluster, host_bytes_per_s=1e9)
    assert estimate_host_optimizer_s(number, narrow) == pytest.approx(4 * number / 1e9)
    none, half, whole = (predict(optimizer_offload_ratio=ratio).optimizer_s for ratio in (0.0, 0.5, 1.0))
    assert none < half < whole
    assert whole - half == pytest.approx(half - none)
