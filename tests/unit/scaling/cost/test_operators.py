"""Work of a layer: matrix products of its weights, with the FLOPs that accounting counts."""

import dataclasses

import pytest

from megatron_hammer.model.accounting import count_flops_per_token, padded_vocab_size
from megatron_hammer.model.shape import LatentAttention, MoeShape, SlidingWindow
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.operators import (
    FLASH_BACKWARD_RATIO,
    Gemm,
    Shard,
    Work,
    build_embedding_work,
    build_head_work,
    build_layer_work,
)

LLAMA = PRESETS["llama2-7b"].model
SHARD = Shard(
    tp=1,
    cp=1,
    ep=1,
    expert_tp=1,
    has_sequence_parallel=False,
    num_tokens=4096,
    seq_length=4096,
    precision="bf16",
    has_flash_attention=True,
    vocab_divisible_by=128,
)


def count_flops(gemms: tuple[Gemm, ...]) -> float:
    return sum(2 * gemm.m * gemm.n * gemm.k * gemm.batch for gemm in gemms)


def count_gemm_flops(work: Work) -> float:
    return count_flops(work.gemms)


def test_the_products_of_a_model_are_the_flops_that_accounting_counts():
    layer, head = build_layer_work(LLAMA, SHARD), build_head_work(LLAMA, SHARD)
    gemms = LLAMA.num_layers * (count_gemm_flops(layer.forward) + count_gemm_flops(layer.backward))
    gemms += count_gemm_flops(head.forward) + count_gemm_flops(head.backward)
    attention = LLAMA.num_layers * layer.forward.attention_flops * 3  # accounting: backward is twice forward
    rows = padded_vocab_size(LLAMA.vocab_size)
    expected = 4096 * count_flops_per_token(LLAMA, 4096, "A", vocab_size=rows)
    assert gemms + attention == pytest.approx(expected, rel=1e-12)


def test_flash_attention_repeats_a_product_backward():
    layer = build_layer_work(LLAMA, SHARD)
    assert layer.backward.attention_flops == FLASH_BACKWARD_RATIO * layer.forward.attention_flops
    assert layer.forward.attention_gemms == ()


def test_tensor_parallelism_cuts_products_and_sequence_parallelism_cuts_norms():
    whole = build_layer_work(LLAMA, SHARD)
    cut = build_layer_work(LLAMA, SHARD._replace(tp=4))
    along = build_layer_work(LLAMA, SHARD._replace(tp=4, has_sequence_parallel=True))
    assert count_gemm_flops(cut.forward) == pytest.approx(count_gemm_flops(whole.forward) / 4)
    assert along.forward.gemms == cut.forward.gemms
    norms = 10 * 2 * 4096 * LLAMA.hidden_size  # elements read and written, two bytes each
    assert cut.forward.pointwise_bytes - along.forward.pointwise_bytes == pytest.approx(norms * 3 / 4)


def test_few_key_value_heads_are_repeated_beyond_their_number():
    grouped = dataclasses.replace(LLAMA, num_query_groups=2)
    four = build_layer_work(grouped, SHARD._replace(tp=4)).forward.gemms[0]
    assert four.n == (LLAMA.num_attention_heads + 2 * 4) * LLAMA.head_dim / 4


def test_unfused_attention_moves_every_score_and_takes_no_flash_flops():
    layer = build_layer_work(LLAMA, SHARD._replace(has_flash_attention=False, num_tokens=3 * 4096))
    scores = 3 * LLAMA.num_attention_heads * 4096**2
    assert layer.forward.attention_bytes == 13 * scores
    assert layer.backward.attention_bytes == 19 * scores
    assert layer.forward.attention_flops == 0
    # no mask is skipped: twice flash attention's forward pass
    flash = build_layer_work(LLAMA, SHARD._replace(num_tokens=3 * 4096)).forward.attention_flops
    assert count_flops(layer.forward.attention_gemms) == pytest.approx(2 * flash)
    assert count_flops(layer.backward.attention_gemms) == pytest.approx(4 * flash)


def test_fp8_applies_to_linear_layers_only():
    layer = build_layer_work(LLAMA, SHARD._replace(precision="fp8"))
    head = build_head_work(LLAMA, SHARD._replace(precision="fp8"))
    assert all(gemm.is_low_precision for gemm in (*layer.forward.gemms, *layer.backward.gemms))
    assert not any(gemm.is_low_precision for gemm in (*head.forward.gemms, *head.backward.gemms))
    casts = layer.forward.pointwise_bytes - build_layer_work(LLAMA, SHARD).forward.pointwise_bytes
    inputs = 4096 * (3 * LLAMA.hidden_size + LLAMA.ffn_hidden_size)
    assert casts == 4 * inputs


def test_gradients_are_added_up_in_four_bytes_once_a_weight():
    layer = build_layer_work(LLAMA, SHARD)
    weights = sum(gemm.n * gemm.k for gemm in layer.forward.gemms)
    assert sum(gemm.extra_bytes for gemm in layer.backward.gemms) == 8 * weights


def test_context_parallelism_shares_out_tokens_and_attention():
    two = build_layer_work(LLAMA, SHARD._replace(cp=2, num_tokens=2048))
    one = build_layer_work(LLAMA, SHARD)
    assert two.forward.attention_flops == one.forward.attention_flops / 2
    assert count_gemm_flops(two.forward) == count_gemm_flops(one.forward) / 2


def test_a_mixture_is_counted_elsewhere():
    moe = MoeShape(num_experts=8, router_topk=2, ffn_hidden_size=LLAMA.ffn_hidden_size)
    dense, sparse = build_layer_work(LLAMA, SHARD), build_layer_work(dataclasses.replace(LLAMA, moe=moe), SHARD)
    assert sparse.forward.gemms == dense.forward.gemms[:2]


def test_latent_attention_is_the_flops_that_accounting_counts():
    latent = LatentAttention(
        q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128
    )
    model = dataclasses.replace(LLAMA, latent_attention=latent, kv_channels=None)
    layer, head = build_layer_work(model, SHARD), build_head_work(model, SHARD)
    flops = LLAMA.num_layers * (count_gemm_flops(layer.forward) + count_gemm_flops(layer.backward))
    flops += count_gemm_flops(head.forward) + count_gemm_flops(head.backward)
    flops += LLAMA.num_layers * layer.forward.attention_flops * 3
    rows = padded_vocab_size(LLAMA.vocab_size)
    # Megatron also counts the norms of the compressed states, measured difference 1.1e-5.
    assert flops == pytest.approx(4096 * count_flops_per_token(model, 4096, "A", vocab_size=rows), rel=2e-5)


def test_a_window_cuts_attention_only_where_every_layer_has_it():
    layers = tuple(range(LLAMA.num_layers))
    whole = build_layer_work(LLAMA, SHARD).forward.attention_flops

    def count(window: SlidingWindow) -> float:
        return build_layer_work(dataclasses.replace(LLAMA, sliding_window=window), SHARD).forward.attention_flops

    assert count(SlidingWindow(num_tokens=128, layers=layers[::2])) == whole
    assert count(SlidingWindow(num_tokens=8192, layers=layers)) == whole
    assert count(SlidingWindow(num_tokens=128, layers=layers)) == pytest.approx(whole * (128 - 2) / 2048)
    assert count(SlidingWindow(num_tokens=1024, layers=layers, is_chunked=True)) == whole / 4


def test_further_tokens_have_logits_of_their_own():
    one, two = build_head_work(LLAMA, SHARD), build_head_work(dataclasses.replace(LLAMA, num_mtp_layers=1), SHARD)
    joined = Gemm(4096, LLAMA.hidden_size, 2 * LLAMA.hidden_size)
    assert two.forward.gemms == (*one.forward.gemms * 2, joined)


def test_layers_without_a_rope_turn_nothing_and_a_residual_multiplier_reads_and_writes_once_more():
    plain = build_layer_work(LLAMA, SHARD).forward.pointwise_bytes
    half = dataclasses.replace(LLAMA, layers_without_rope=tuple(range(0, LLAMA.num_layers, 2)))
    turned = 2 * 2 * 2 * 4096 * LLAMA.hidden_size  # two bytes, read and written, of queries and keys
    assert plain - build_layer_work(half, SHARD).forward.pointwise_bytes == pytest.approx(turned / 2)
    scaled = dataclasses.replace(LLAMA, residual_multiplier=0.22)
    assert build_layer_work(scaled, SHARD).forward.pointwise_bytes - plain == pytest.approx(turned)


def test_the_embedding_has_no_products_and_a_norm_costs_bytes():
    plain = build_embedding_work(LLAMA, SHARD)
    normed = build_embedding_work(dataclasses.replace(LLAMA, has_embedding_norm=True), SHARD)
    assert plain.forward.gemms == ()
    assert normed.forward.pointwise_bytes > plain.forward.pointwise_bytes
