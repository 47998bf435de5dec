"""Activations that a layer keeps: each module by its formula, and what each recompute mode frees."""

import dataclasses

import pytest

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.activations import estimate_layer_activations
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.model.shape import LatentAttention, MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.layer_activations import count_layer_activation_bytes

# hidden 512, ffn 1408, 8 heads of 64, 2 query groups: all widths differ.
LLAMA = dataclasses.replace(
    PRESETS["hammer-1b4"].model,
    num_layers=3,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=2,
)
H, FFN, Q, KV, HEADS = 512, 1408, 512, 128, 8
TOKENS = 96


def count(model=LLAMA, layout=None, **options):
    return count_layer_activation_bytes(
        model, layout or ParallelLayout(), num_tokens=TOKENS, options=MemoryOptions(**options)
    )


def test_bf16_layer_by_its_formula():
    assert count() == TOKENS * (8 * H + 4 * Q + 4 * KV + 6 * FFN + 4 * HEADS)


def test_fp32_is_twice_16_bits_but_for_the_row_statistics():
    statistics = TOKENS * 4 * HEADS
    assert count(precision="fp32") - statistics == 2 * (count() - statistics)


@pytest.mark.parametrize("precision, copy_bytes", [("fp8", 1), ("mxfp8", 33 / 32), ("nvfp4", 9 / 16)])
def test_linears_keep_quantized_inputs_and_attention_its_own_output(precision, copy_bytes):
    # Norm inputs, q, k, v, attention's output and gate and up stay 16-bit; four inputs of linears are quantized.
    kept_16_bit = 4 * H + 2 * (Q + 2 * KV) + 2 * Q + 4 * FFN + 4 * HEADS
    quantized = copy_bytes * (2 * H + Q + FFN)
    assert count(precision=precision) == round(TOKENS * (kept_16_bit + quantized))


def test_unfused_attention_keeps_every_pair_of_positions():
    flash, plain = count(), count(has_flash_attention=False)
    repeated_keys = 2 * TOKENS * 2 * (Q - KV)
    assert plain - (flash - 4 * TOKENS * HEADS) == 2 * HEADS * TOKENS**2 + repeated_keys
    with_dropout = count(has_flash_attention=False, has_attention_dropout=True)
    assert with_dropout - plain == 3 * HEADS * TOKENS**2  # a mask of one byte and what it lets through


def test_exchanged_heads_keep_an_output_of_their_own():
    layout = ParallelLayout(context_parallel_size=2)
    assert count(layout=layout, is_context_parallel_all_to_all=True) - count(layout=layout) == 2 * TOKENS * Q
    assert count(is_context_parallel_all_to_all=True) == count()  # nothing to exchange


@pytest.mark.parametrize(
    "modules, given_up",
    [
        (("core_attn",), 4 * HEADS),
        (("layernorm",), 2 * 2 * H),
        (("mlp",), 2 * H + 6 * FFN),
        (("mlp", "core_attn"), 2 * H + 6 * FFN + 4 * HEADS),
    ],
)
def test_modules_give_up_what_they_recompute(modules, given_up):
    assert count() - count(recompute="selective", recompute_modules=modules) == TOKENS * given_up


def test_modules_of_experts_give_up_what_they_recompute():
    moe = dataclasses.replace(
        LLAMA, moe=MoeShape(num_experts=4, router_topk=2, ffn_hidden_size=320, shared_expert_intermediate_size=448)
    )
    copies, router, shared = 2 * TOKENS, TOKENS * 4 * 4, TOKENS * 6 * 448
    routed = copies * (2 * H + 6 * 320) + router
    assert count(moe) == TOKENS * (8 * H + 4 * Q + 4 * KV + 4 * HEADS) + routed + shared

    def saved(*modules):
        return count(moe) - count(moe, recompute="selective", recompute_modules=modules)

    assert saved("moe") == routed + shared
    assert saved("moe_act") == copies * 2 * 320
    assert saved("shared_experts") == shared
    assert saved("mlp") == 0  # there is no dense MLP


def test_full_recomputation_keeps_the_input_and_makes_the_layer_whole_again():
    batch = Batch(micro_batch_size=1, seq_length=TOKENS)
    layer = estimate_layer_activations(LLAMA, ParallelLayout(), batch, MemoryOptions(recompute="full"))
    assert layer.kept == 2 * TOKENS * H
    assert layer.kept + layer.remade == count()
    # Backward: the gradients of gate and up, and of the residual.
    assert layer.transient == 2 * TOKENS * (2 * FFN + H)


def test_operators_checkpointed_by_torchtitan():
    kept = count(recompute="selective", recompute_modules=("every_other_matmul",))
    assert kept == 2 * TOKENS * (2 * H + 2 * Q + KV + FFN)


def test_sequence_parallelism_gathers_two_hidden_states_for_the_backward_pass():
    batch, options = Batch(micro_batch_size=1, seq_length=TOKENS), MemoryOptions()
    tensor = ParallelLayout(tensor_model_parallel_size=2)
    repeated = estimate_layer_activations(LLAMA, tensor, batch, options)
    divided = estimate_layer_activations(LLAMA, dataclasses.replace(tensor, has_sequence_parallel=True), batch, options)
    assert repeated.kept - divided.kept == 8 * H * TOKENS // 2
    assert divided.transient - repeated.transient == 2 * (2 * TOKENS * H) - TOKENS * H


def test_expanded_heads_take_the_place_of_key_and_value():
    assert count(has_expanded_heads=True) - count() == 2 * TOKENS * 2 * (Q - KV)


def test_silu_without_fusion_keeps_its_output():
    assert count(has_fused_activation=False) - count() == 2 * TOKENS * FFN
    # megatron.core.transformer.mlp adds an offset, 0 for SwiGLU, to the other half.
    assert count(has_fused_activation=False, has_linear_offset=True) - count() == 2 * 2 * TOKENS * FFN


def test_a_recomputed_mlp_keeps_the_output_of_a_norm_that_is_not_part_of_it():
    recomputed = {"recompute": "selective", "recompute_modules": ("mlp",)}
    assert count(**recomputed, has_fused_norms=False) - count(**recomputed) == 2 * TOKENS * H


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, Q + KV),
        ({"has_qk_norm": True}, Q),  # the keys before their norm are a view of it too
        ({"position_embedding_type": "learned_absolute"}, Q),
        ({"layers_without_rope": (1,)}, Q + KV * 2 / 3),  # the average of three layers
        ({"position_embedding_type": "learned_absolute", "num_query_groups": HEADS}, 0),
        ({"has_qk_norm": True, "num_query_groups": 1}, 0),
    ],
)
def test_values_that_are_a_view_keep_the_output_of_linear_qkv(changes, kept):
    model = dataclasses.replace(LLAMA, **changes)
    assert count(model, has_separate_values=False) - count(model) == 2 * TOKENS * kept


def test_a_weight_gradient_of_its_own_is_the_largest_of_the_layer():
    batch = Batch(micro_batch_size=1, seq_length=TOKENS)
    fused, plain = (
        estimate_layer_activations(
            LLAMA, ParallelLayout(), batch, MemoryOptions(has_fused_weight_gradients=is_fused)
        ).transient
        for is_fused in (True, False)
    )
    assert plain - fused == 2 * 2 * H * FFN


def test_a_quantized_mixture_keeps_its_norm_for_the_router_and_a_copy_for_the_shared_expert():
    moe = dataclasses.replace(LLAMA, moe=MoeShape(num_experts=4, router_topk=2, ffn_hidden_size=320))
    shared = dataclasses.replace(moe, moe=dataclasses.replace(moe.moe, shared_expert_intermediate_size=448))
    attention = TOKENS * (2 * H + H + 2 * (Q + 2 * KV) + Q + 2 * Q + 4 * HEADS)
    routed = 2 * TOKENS * (H + 4 * 320 + 320) + TOKENS * 4 * 4
    assert count(moe, precision="fp8") == attention + TOKENS * (2 * H + 2 * H) + routed
    assert count(shared, precision="fp8") - count(moe, precision="fp8") == TOKENS * (H + 5 * 448)


def test_latent_attention_by_its_formula():
    latent = LatentAttention(q_lora_rank=96, kv_lora_rank=72, qk_head_dim=40, qk_pos_emb_head_dim=24, v_head_dim=48)
    model = dataclasses.replace(LLAMA, num_query_groups=8, latent_attention=latent, has_qk_norm=True)
    heads, ranks, rope = 8 * (64 + 64 + 48), 96 + 72, 24
    mlp = 4 * H + 6 * FFN
    assert count(model) == TOKENS * (4 * H + 4 * ranks + 2 * rope + 2 * heads + 2 * 8 * 48 + 4 * HEADS + mlp)
    up = {"recompute": "selective", "recompute_modules": ("mla_up_proj",)}
    assert count(model) - count(model, **up) == TOKENS * 2 * (heads + ranks)
    # Two linears quantize the output of the input norm; attention keeps an output of its own.
    fp8 = 2 * H + 2 * H + 3 * ranks + 2 * rope + 2 * heads + 3 * 8 * 48 + 4 * HEADS
    assert count(model, precision="fp8") == TOKENS * (fp8 + 3 * H + 5 * FFN)


def test_tensor_parallel_ranks_cut_the_heads_and_not_the_compressed_states():
    latent = LatentAttention(q_lora_rank=96, kv_lora_rank=72, qk_head_dim=40, qk_pos_emb_head_dim=24, v_head_dim=48)
    model = dataclasses.replace(LLAMA, num_query_groups=8, latent_attention=latent, has_qk_norm=True)
    layout = ParallelLayout(tensor_model_parallel_size=2)
    heads = 2 * 8 * (64 + 64 + 48) + 2 * 8 * 48 + 4 * HEADS
    assert count(model) - count(model, layout) == TOKENS * (heads + 6 * FFN) // 2
    divided = dataclasses.replace(layout, has_sequence_parallel=True)
    assert 2 * count(model, divided) == count(model)


def test_a_norm_without_weights_keeps_queries_and_keys_of_the_layers_that_have_it():
    model = dataclasses.replace(LLAMA, has_qk_l2_norm=True, layers_without_rope=(2,))
    assert count(model) - count() == round(TOKENS * 2 * (Q + KV) * 2 / 3)
