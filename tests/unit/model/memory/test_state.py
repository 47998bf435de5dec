"""State and permanent buffers of a stage: bytes per parameter, quantized copies, placeholders, gathered layers."""

import dataclasses
from dataclasses import replace

import pytest

from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.options import WORKSPACE_BYTES, MemoryOptions
from megatron_hammer.model.memory.state import count_shard_ranks, estimate_state, select_part_sizes
from megatron_hammer.model.parameters import count_optimizer_shard, count_rank_parameters, list_mtp_kinds
from megatron_hammer.model.pipeline_split import split_layers
from megatron_hammer.model.shape import LatentAttention
from megatron_hammer.presets.catalogue import PRESETS

MODEL = PRESETS["hammer-1b4"].model
H, FFN, KV, ROWS = 2048, 5632, 256, 105_856  # the vocabulary is padded to a multiple of 128
LAYER_LINEARS = H * (H + 2 * KV) + H * H + 3 * H * FFN
LAYER = LAYER_LINEARS + 2 * H
WHOLE_MODEL = {"kinds": [(MODEL, 22)], "is_first_stage": True, "is_last_stage": True}


def estimate(layout=None, stage=WHOLE_MODEL, **options):
    return estimate_state(
        MODEL, layout or ParallelLayout(has_distributed_optimizer=False), MemoryOptions(**options), **stage
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "model_name, pp",
    [("hammer-1b4", 1), ("hammer-1b4", 11), ("gpt2-124m", 1), ("gpt2-124m", 3), ("tiny-llm-zh-moe", 1),
     ("tiny-llm-zh-moe", 2), ("tiny-llm-zh-moe with dense layers", 1), ("tiny-llm-zh-moe with dense layers", 2),
     ("hammer-1b4 with latents", 2), ("tiny-llm-zh-moe with further tokens", 1),
     ("tiny-llm-zh-moe with further tokens", 2)],
)  # fmt: skip
def test_parts_add_up_to_the_exact_count_of_a_rank(tp, pp, model_name):
    name, _, addition = model_name.partition(" with ")
    model = PRESETS[name].model
    if addition == "dense layers":
        model = replace(model, moe=replace(model.moe, dense_layers=(0, 2)))
    elif addition == "latents":
        latent = LatentAttention(q_lora_rank=96, kv_lora_rank=64, qk_head_dim=40, qk_pos_emb_head_dim=24, v_head_dim=48)
        model = replace(model, num_query_groups=32, latent_attention=latent, has_qk_norm=True)
    elif addition == "further tokens":
        model = replace(model, num_mtp_layers=2)
    ep = 2 if model.moe else 1
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=4,
        expert_model_parallel_size=ep,
        has_sequence_parallel=tp > 1,
    )
    for pp_rank, chunks in enumerate(split_layers(model.num_layers, layout)):
        if pp_rank not in (0, pp - 1):
            continue
        exact = count_rank_parameters(model, layout, pp_rank)
        shard = count_optimizer_shard(model, layout, pp_rank)
        state = estimate_state(
            model,
            layout,
            MemoryOptions(),
            kinds=model.split_kinds(chunks[0].list_layers()) + (list_mtp_kinds(model) if pp_rank == pp - 1 else []),
            is_first_stage=pp_rank == 0,
            is_last_stage=pp_rank == pp - 1,
        )
        assert (state.weights, state.gradients, state.optimizer) == (2 * exact.total, 4 * exact.total, 12 * shard.total)


def test_placeholders_of_weight_gradients_are_one_for_each_shape():
    plain, fused = estimate(has_fused_weight_gradients=False), estimate()
    assert plain.buffers == WORKSPACE_BYTES
    assert fused.buffers - plain.buffers == 2 * (LAYER_LINEARS + ROWS * H)
    middle = {"kinds": [(MODEL, 11)], "is_first_stage": False, "is_last_stage": False}
    assert estimate(stage=middle).buffers - WORKSPACE_BYTES == 2 * LAYER_LINEARS  # no head there


@pytest.mark.parametrize("precision, copy_bytes", [("fp8", 1), ("mxfp8", 33 / 32), ("nvfp4", 9 / 16)])
def test_quantized_weights_are_kept_twice(precision, copy_bytes):
    linears = 22 * LAYER_LINEARS
    beside, instead = estimate(precision=precision), estimate(precision=precision, has_quantized_parameters=True)
    assert beside.weights == estimate().weights
    assert beside.buffers - estimate().buffers == round(2 * copy_bytes * linears)
    assert instead.weights == estimate().weights - 2 * linears + round(2 * copy_bytes * linears)
    assert instead.buffers == estimate().buffers


def test_blackwell_keeps_one_copy_of_per_tensor_fp8():
    linears = 22 * LAYER_LINEARS
    one = estimate(precision="fp8", has_transposed_weights=False)
    assert one.buffers - estimate().buffers == linears
    instead = estimate(precision="fp8", has_transposed_weights=False, has_quantized_parameters=True)
    assert instead.weights == estimate().weights - linears


def test_fsdp_gathers_quantized_parameters_of_the_layers_at_work_only():
    layout = ParallelLayout(data_parallel_size=8)
    options = {"sharding": "fsdp", "has_fused_weight_gradients": False, "precision": "fp8"}
    beside, instead = estimate(layout, **options), estimate(layout, has_quantized_parameters=True, **options)
    unit = 2 * LAYER_LINEARS + 2 * (LAYER - LAYER_LINEARS)  # an 8-bit copy and its transpose, norms in 16 bits
    assert instead.buffers - WORKSPACE_BYTES == 2 * unit + 6 * (ROWS * H + H)
    # TransformerEngine keeps the copies of 16-bit weights, whole ones on every rank.
    assert beside.buffers - WORKSPACE_BYTES == 2 * 2 * LAYER + 6 * (ROWS * H + H) + 2 * 22 * LAYER_LINEARS
    # The shard has no transposes: they are made when a layer is gathered.
    assert beside.weights - instead.weights == pytest.approx(22 * LAYER_LINEARS / 8, abs=2)


def test_an_offloaded_optimizer_is_on_the_host():
    layout = ParallelLayout(data_parallel_size=8)
    whole, half = estimate(layout), estimate(layout, optimizer_offload_ratio=0.5)
    assert half.optimizer == pytest.approx(whole.optimizer / 2, abs=12)
    assert half.host == pytest.approx(18 * whole.optimizer / 12 / 2, abs=18)  # with the gradient and a 16-bit copy
    assert (half.weights, half.gradients, half.buffers, whole.host) == (*whole[:2], whole.buffers, 0)


def test_fsdp_divides_all_state_and_gathers_layers():
    layout = ParallelLayout(data_parallel_size=8)
    whole = estimate(has_fused_weight_gradients=False)
    sharded = estimate(layout, sharding="fsdp", has_fused_weight_gradients=False)
    parameters = whole.weights // 2
    shard = -(-parameters // 8)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (2 * shard, 4 * shard, 12 * shard)
    # Two layers in 16 bits; the head, which is larger, with its weight and gradient.
    assert sharded.buffers - whole.buffers == 2 * 2 * LAYER + 6 * (ROWS * H + H)
    kept = estimate(layout, sharding="fsdp", has_fused_weight_gradients=False, reshards_after_forward=False)
    assert kept.buffers - whole.buffers == 6 * parameters


def test_number_of_ranks_that_share_the_optimizer():
    layout = ParallelLayout(data_parallel_size=8, context_parallel_size=2, expert_model_parallel_size=4)
    assert count_shard_ranks(layout, MemoryOptions()) == (16, 4)
    assert count_shard_ranks(layout, MemoryOptions(shard_size=8)) == (8, 2)  # two copies of everything
    assert count_shard_ranks(layout, MemoryOptions(sharding="none")) == (1, 1)
    whole = dataclasses.replace(layout, has_distributed_optimizer=False)
    assert count_shard_ranks(whole, MemoryOptions()) == (1, 1)
    assert count_shard_ranks(whole, MemoryOptions(sharding="fsdp")) == (16, 4)


def test_a_tied_head_has_a_placeholder_too():
    tied = PRESETS["gpt2-124m"].model
    h, rows = tied.hidden_size, 50_304
    layout = ParallelLayout(has_distributed_optimizer=False)
    state = estimate_state(tied, layout, MemoryOptions(), kinds=[(tied, 12)], is_first_stage=True, is_last_stage=True)
    # fc1 and fc2 have as many elements but not the same shape.
    assert state.buffers - WORKSPACE_BYTES == 2 * (3 * h * h + h * h + 2 * 4 * h * h + rows * h)


def test_a_tied_head_is_a_copy_only_on_a_stage_of_its_own():
    tied = PRESETS["gpt2-124m"].model
    assert select_part_sizes(tied, ParallelLayout(), 128)[2].dense == 2 * tied.hidden_size  # the final norm
    _, embedding, head = select_part_sizes(tied, ParallelLayout(pipeline_model_parallel_size=2), 128)
    assert head.dense - 2 * tied.hidden_size == 50_304 * tied.hidden_size < embedding.dense


def test_muon_keeps_one_moment_of_matrices():
    model, layout = PRESETS["hammer-1b4"].model, ParallelLayout()
    stage = {"kinds": model.split_kinds(), "is_first_stage": True, "is_last_stage": True}
    adam = estimate_state(model, layout, MemoryOptions(), **stage)
    muon = estimate_state(model, layout, MemoryOptions(matrix_moments_bytes=4), **stage)
    matrices = 22 * (2560 * 2048 + 2048 * 2048 + 3 * 2048 * 5632)  # query, key and value; projection; SwiGLU's three
    assert adam.optimizer - muon.optimizer == 4 * matrices
    assert adam[:2] == muon[:2]
