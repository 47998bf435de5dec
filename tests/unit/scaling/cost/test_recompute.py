"""What selective recomputation repeats, by module."""

from dataclasses import replace

import pytest

from megatron_hammer.model.shape import LatentAttention, MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.operators import Shard, build_layer_work
from megatron_hammer.scaling.cost.recompute import build_recomputed_work

DENSE = PRESETS["llama2-7b"].model
MOE = replace(
    DENSE,
    moe=MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=1536, shared_expert_intermediate_size=768),
)
SHARD = Shard(1, 1, 1, 1, False, 4096, 4096, "bf16", True, 128)


def test_nothing_is_repeated_without_modules() -> None:
    assert build_recomputed_work(DENSE, SHARD, ()).pointwise_bytes == 0


def test_a_dense_layer_repeats_its_mlp_and_a_mixture_does_not() -> None:
    dense = build_recomputed_work(DENSE, SHARD, ("mlp",))
    assert dense.gemms == build_layer_work(DENSE, SHARD).forward.gemms[2:]
    assert build_recomputed_work(MOE, SHARD, ("mlp",)).gemms == ()
    assert len(build_recomputed_work(MOE, SHARD, ("shared_experts",)).gemms) == 2


def test_activations_norms_and_projections() -> None:
    elements = build_recomputed_work(MOE, SHARD, ("moe_act",)).pointwise_bytes / 2
    assert elements == 3 * 4096 * 2 * 1536
    norms = build_recomputed_work(DENSE, SHARD, ("layernorm",)).pointwise_bytes / 2
    assert norms == pytest.approx(4 * 4096 * DENSE.hidden_size)
    latent = LatentAttention(q_lora_rank=96, kv_lora_rank=64, qk_head_dim=48, qk_pos_emb_head_dim=16, v_head_dim=40)
    model = replace(DENSE, latent_attention=latent, kv_channels=None)
    projected = build_recomputed_work(model, SHARD, ("mla_up_proj",)).gemms
    assert [gemm.k for gemm in projected] == [96, 64]


def test_every_other_product_is_half_of_the_linears() -> None:
    """torchtitan repeats k, out and up of Llama's seven; grouped queries make k small."""
    model = replace(DENSE, num_query_groups=4)
    repeated = build_recomputed_work(model, SHARD, ("every_other_matmul",)).gemms
    out_and_up = 4096 * model.hidden_size * (model.hidden_size + model.ffn_hidden_size)
    assert sum(gemm.m * gemm.n * gemm.k for gemm in repeated) == out_and_up
