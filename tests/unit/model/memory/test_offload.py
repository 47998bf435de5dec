"""Activation offload: what leaves the GPU, what comes back for a layer's backward pass, what the host holds."""

import dataclasses

import pytest

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.estimate import estimate_memory
from megatron_hammer.model.memory.offload import count_offloaded
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.presets.catalogue import PRESETS

MODEL, MIXTURE = PRESETS["hammer-1b4"].model, PRESETS["tiny-llm-zh-moe"].model
H, FFN, KV, LAYERS = 2048, 5632, 256, 22
TOKENS = 2 * 512
BATCH = Batch(micro_batch_size=2, seq_length=512)
ALONE = ParallelLayout()


def count(modules, model=MODEL, layout=ALONE, **options):
    return count_offloaded(model, layout, BATCH, MemoryOptions(offload_modules=modules, **options))


def estimate(layout=ALONE, **options):
    run = {"micro_batch_size": 2, "seq_length": 512, "num_microbatches": 8}
    return estimate_memory(MODEL, layout, options=MemoryOptions(**options), **run)


@pytest.mark.parametrize(
    ("module", "width_bytes"),
    [("attn_norm", 2 * H), ("mlp_norm", 2 * H), ("qkv_linear", 2 * H), ("core_attn", 2 * (H + 2 * KV)),
     ("attn_proj", 2 * H), ("expert_fc1", 0)],
)  # fmt: skip
def test_inputs_of_modules_leave_the_gpu(module, width_bytes):
    assert count((module,)) == TOKENS * width_bytes
    assert count((module,), offload_ratio=0.5) == TOKENS * width_bytes / 2


def test_quantized_inputs_and_recomputed_ones():
    assert count(("qkv_linear",), precision="fp8") == TOKENS * H
    assert count(("qkv_linear",), recompute="selective", recompute_modules=("layernorm",)) == 0
    assert count(("attn_norm",), recompute="full") == 0


def test_experts_offload_their_copies_of_tokens():
    moe = MIXTURE.moe
    copies, h, ffn = TOKENS * moe.router_topk, MIXTURE.hidden_size, moe.ffn_hidden_size
    assert count(("expert_fc1",), MIXTURE) == copies * 2 * h
    assert count(("moe_act",), MIXTURE) == copies * 2 * 2 * ffn
    assert count(("fused_group_mlp",), MIXTURE) == copies * (2 * h + 2 * 2 * ffn + 2 * ffn)
    assert count(("expert_fc1",), MIXTURE, expert_imbalance_ratio=1.5) == 1.5 * copies * 2 * h
    assert count(("expert_fc1",), MIXTURE, recompute="selective", recompute_modules=("moe",)) == 0


def test_modules_of_every_layer_wait_on_the_host_and_one_layer_comes_back():
    layout = ParallelLayout(pipeline_model_parallel_size=2)
    plain, moved = estimate(layout), estimate(layout, offload_modules=("core_attn", "mlp_norm"))
    one = count(("core_attn", "mlp_norm"))
    for before, after in zip(plain, moved, strict=True):
        alive = before.num_layers * before.num_in_flight
        assert after.host_bytes == alive * one
    # The first stage peaks in a layer's backward pass, the last one at the loss.
    assert plain[0].activations_bytes - moved[0].activations_bytes == (11 * 2 - 1) * one
    assert plain[1].activations_bytes - moved[1].activations_bytes == 11 * one


def test_whole_layers_wait_on_the_host():
    (plain,), (moved,) = estimate(), estimate(num_offloaded_layers=8)
    assert moved.host_bytes > 0
    assert plain.activations_bytes - moved.activations_bytes == moved.host_bytes
    (all_but_one,) = estimate(num_offloaded_layers=LAYERS - 1)
    assert all_but_one.host_bytes == pytest.approx(moved.host_bytes * (LAYERS - 1) / 8, rel=1e-6)
    assert plain.host_bytes == 0


def test_more_tokens_for_one_rank_need_more_memory():
    layout = dataclasses.replace(ALONE, data_parallel_size=2, expert_model_parallel_size=2)
    run = {"micro_batch_size": 2, "seq_length": 512, "num_microbatches": 8}
    even, uneven = (
        estimate_memory(MIXTURE, layout, options=MemoryOptions(expert_imbalance_ratio=ratio), **run)[0]
        for ratio in (1.0, 1.5)
    )
    assert uneven.activations_bytes > even.activations_bytes
    assert uneven.state_bytes == even.state_bytes
