"""The work of a mixture: the FLOPs that accounting counts, and the copies of tokens that reach a rank."""

from dataclasses import replace

import pytest

from megatron_hammer.model.accounting import count_flops_per_token, padded_vocab_size
from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.expert_work import PERMUTED_ELEMENTS, build_mixture_work
from megatron_hammer.scaling.cost.operators import Gemm, Shard, build_head_work, build_layer_work
from megatron_hammer.scaling.plan import DISPATCHERS, ExpertOptions

MOE = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=1536, shared_expert_intermediate_size=768)
MODEL = replace(PRESETS["llama2-7b"].model, moe=MOE)
SHARD = Shard(1, 1, 1, 1, False, 4096, 4096, "bf16", True, 128)


def count_flops(gemms: tuple[Gemm, ...]) -> float:
    return sum(2 * gemm.m * gemm.n * gemm.k * gemm.batch for gemm in gemms)


def test_the_products_of_a_model_are_the_flops_that_accounting_counts() -> None:
    layer, head, mixture = (
        build_layer_work(MODEL, SHARD),
        build_head_work(MODEL, SHARD),
        build_mixture_work(MODEL, SHARD),
    )
    works = (*layer, *mixture.rest)
    flops = MODEL.num_layers * (sum(count_flops(work.gemms) for work in works) + sum(map(count_flops, mixture.experts)))
    flops += count_flops(head.forward.gemms) + count_flops(head.backward.gemms)
    flops += MODEL.num_layers * layer.forward.attention_flops * 3
    flops -= MODEL.num_layers * 6 * 4096 * MOE.num_experts * MODEL.hidden_size  # accounting leaves out the router
    rows = padded_vocab_size(MODEL.vocab_size)
    assert flops == pytest.approx(4096 * count_flops_per_token(MODEL, 4096, "A", vocab_size=rows), rel=1e-12)


@pytest.mark.parametrize(("ep", "expert_tp"), [(4, 1), (2, 3), (1, 1)])
def test_every_copy_of_a_token_is_computed_once(ep: int, expert_tp: int) -> None:
    """Over the ranks of a group, whatever its shape: each brings its tokens, and each computes its part of them."""
    shard = SHARD._replace(ep=ep, expert_tp=expert_tp)
    (first, second), _ = build_mixture_work(MODEL, shard).experts
    whole = count_flops(build_mixture_work(MODEL, SHARD).experts[0])
    assert count_flops((first, second)) == pytest.approx(whole)
    assert first.batch == MOE.num_experts / ep
    assert first.n == 2 * MOE.ffn_hidden_size / expert_tp


def test_imbalance_multiplies_the_work_of_experts_and_nothing_else() -> None:
    shard = SHARD._replace(experts=ExpertOptions(imbalance_ratio=1.5))
    even, uneven = build_mixture_work(MODEL, SHARD), build_mixture_work(MODEL, shard)
    assert count_flops(uneven.experts[0]) == pytest.approx(1.5 * count_flops(even.experts[0]))
    assert uneven.permuted_bytes == pytest.approx(1.5 * even.permuted_bytes)
    assert uneven.rest.forward.gemms == even.rest.forward.gemms


def test_dispatchers_permute_differently() -> None:
    moved = {
        name: build_mixture_work(MODEL, SHARD._replace(experts=ExpertOptions(dispatcher=name))).permuted_bytes
        for name in DISPATCHERS
    }
    copies_bytes = 4096 * MOE.router_topk * MODEL.hidden_size * 2
    assert moved == pytest.approx({name: PERMUTED_ELEMENTS[name] * copies_bytes for name in DISPATCHERS})


def test_low_precision_and_biases_cost_launches_for_each_expert() -> None:
    def count(model: ModelShape, **changes: object) -> tuple[float, float]:
        return build_mixture_work(model, SHARD._replace(ep=4, **changes)).num_launches

    assert count(MODEL) == (2 * 2, 4 * 2)
    assert count(MODEL, precision="fp8") == (2 * 4, 4 * 4)
    biased = replace(MODEL, has_linear_bias=True, has_qkv_bias=True)
    assert count(biased) == (2 * 5, 2 * 10)
    assert count(biased, cuda_graphs="step") == count(MODEL)
