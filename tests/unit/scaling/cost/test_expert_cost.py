"""Seconds of a mixture: few tokens per expert are slow, and the host is spared by graphs and capacity."""

from dataclasses import replace

import pytest

from megatron_hammer.model.shape import MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients
from megatron_hammer.scaling.cost.compute import build_rates, estimate_gemm_s
from megatron_hammer.scaling.cost.expert_cost import MixtureCost, build_mixture_cost, estimate_grouped_gemm_s
from megatron_hammer.scaling.cost.operators import Gemm, Shard
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import CudaGraphs, ExpertOptions

PRIORS = build_prior_coefficients()
GPU, CLUSTER = select_gpu("h100-sxm"), select_cluster("dgx-h100")
RATES = build_rates(GPU, "bf16", PRIORS)
MODEL = replace(PRESETS["llama2-7b"].model, moe=MoeShape(num_experts=64, router_topk=8, ffn_hidden_size=1536))
SHARD = Shard(1, 1, 8, 1, False, 4096, 4096, "bf16", True, 128)


def grouped_s(tokens_per_expert: float, num_experts: int, *, is_grouped: bool = True) -> float:
    gemm = Gemm(tokens_per_expert, 3072, 4096, num_experts)
    return estimate_grouped_gemm_s(gemm, RATES, PRIORS, is_grouped=is_grouped)


def test_few_tokens_per_expert_are_slow() -> None:
    """The same number of tokens, over more and more experts: tiles are padded, and more weights are read."""
    times = [grouped_s(65_536 / experts, experts) for experts in (1, 8, 64, 512)]
    assert times == sorted(times)
    assert times[1] < 1.02 * times[0]
    assert times[3] > 1.4 * times[0]


def test_one_product_after_the_other_does_not_fill_the_device() -> None:
    assert grouped_s(256, 64, is_grouped=False) > 1.2 * grouped_s(256, 64)
    assert grouped_s(16_384, 1, is_grouped=False) == grouped_s(16_384, 1)


def test_a_large_group_is_as_fast_as_its_ratio_says() -> None:
    whole = estimate_gemm_s(Gemm(65_536, 3072, 4096), RATES, PRIORS.gemm_fill_waves)
    assert grouped_s(65_536, 1) == pytest.approx(whole / PRIORS.experts.grouped_gemm_ratio, rel=0.05)


def mixture(graphs: CudaGraphs = "none", **options: object) -> MixtureCost:
    shard = SHARD._replace(cuda_graphs=graphs, experts=ExpertOptions(**options))  # type: ignore[arg-type]
    return build_mixture_cost(MODEL, shard, GPU, CLUSTER, PRIORS)


def test_graphs_spare_the_host() -> None:
    hosts = [mixture(graphs).forward.host_s for graphs in ("none", "router", "step")]  # type: ignore[arg-type]
    assert hosts[0] > hosts[1] > hosts[2] == 0.0
    assert mixture(has_grouped_gemm=False).forward.host_s > hosts[0]


def test_the_device_waits_for_the_sizes_of_tokens_unless_they_are_fixed() -> None:
    waits = mixture().forward.gap_s - mixture(pads_to_capacity=True).forward.gap_s
    assert waits == pytest.approx(PRIORS.experts.sync_s)
    assert mixture("step").forward.gap_s == pytest.approx(mixture(pads_to_capacity=True).forward.gap_s)
    assert mixture().backward.gap_s == mixture(pads_to_capacity=True).backward.gap_s
