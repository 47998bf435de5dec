"""Estimated memory: the paper's formulas and figures, peaks that Megatron-LM recorded, and effects of layouts."""

import dataclasses

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.memory.estimate import (
    CUDA_CONTEXT_BYTES,
    count_alive,
    count_in_flight,
    estimate_memory,
)
from megatron_hammer.model.memory.loss import estimate_head
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.model.parameters import layer_tensors
from megatron_hammer.model.shape import LatentAttention, ModelShape, MoeShape
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.layer_activations import count_layer_activation_bytes
from tests.helpers.recipe_layouts import build_layout

GPT_22B = ModelShape(
    name="gpt-22b",
    source="Korthikanti et al. 2022, table 3",
    num_layers=48,
    hidden_size=6144,
    ffn_hidden_size=4 * 6144,
    num_attention_heads=64,
    num_query_groups=64,
    vocab_size=51_200,
    max_position_embeddings=2048,
    normalization="LayerNorm",
    activation="gelu_tanh",
    position_embedding_type="learned_absolute",
    has_linear_bias=True,
    has_tied_embeddings=True,
)
TP8 = ParallelLayout(tensor_model_parallel_size=8, has_distributed_optimizer=False)
TP8_SP = dataclasses.replace(TP8, has_sequence_parallel=True)


@pytest.mark.parametrize("layout, sbh", [(TP8, 10 + 24 / 8), (TP8_SP, 34 / 8)], ids=["tensor", "tensor and sequence"])
def test_layer_is_the_papers_equation_without_the_quadratic_term(layout, sbh):
    kept = count_layer_activation_bytes(
        GPT_22B, layout, num_tokens=4 * 2048, options=MemoryOptions(has_hidden_dropout=True)
    )
    log_sum_exp = 4 * 64 // 8 * 4 * 2048
    assert kept - log_sum_exp == sbh * 4 * 2048 * 6144


def test_the_papers_figure_1_is_reproduced():
    (stage,) = estimate_memory(
        GPT_22B,
        TP8_SP,
        micro_batch_size=4,
        seq_length=2048,
        num_microbatches=1,
        options=MemoryOptions(has_hidden_dropout=True),
    )
    # Figure 1 shows 45.6 and 9.6 GiB; measured differences +2.0% (it counts 22e9 parameters) and +0.4%.
    assert stage.state_bytes / GIB == pytest.approx(45.5625, rel=0.025)
    assert stage.activations_bytes / GIB == pytest.approx(9.5625, rel=0.01)


# Peaks of torch's allocator in Megatron-LM's own functional tests (golden values, mem-max-allocated-bytes): 12 layers,
# hidden 512, 8 heads, sequence 1024, micro-batch 4, global batch 32, 8 GPUs, bf16, dropout 0.1.
CI_GPT = dataclasses.replace(
    PRESETS["gpt2-124m"].model, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, num_query_groups=8
)
CI_PEAKS_GIB = {
    "tp1 pp1 distributed optimizer": (ParallelLayout(data_parallel_size=8), 1, "none", 2.5059),
    "tp1 pp1 full recompute": (
        ParallelLayout(data_parallel_size=8, has_distributed_optimizer=False),
        1,
        "full",
        2.3854,
    ),
    "tp1 pp2": (
        ParallelLayout(pipeline_model_parallel_size=2, data_parallel_size=4, has_distributed_optimizer=False),
        2,
        "none",
        2.4198,
    ),
    "tp1 pp4": (
        ParallelLayout(pipeline_model_parallel_size=4, data_parallel_size=2, has_distributed_optimizer=False),
        4,
        "none",
        2.0600,
    ),
    "tp1 pp4 vp3": (
        ParallelLayout(
            pipeline_model_parallel_size=4,
            virtual_pipeline_model_parallel_size=3,
            data_parallel_size=2,
            has_distributed_optimizer=False,
        ),
        4,
        "none",
        2.4618,
    ),
    "tp2 pp2": (
        ParallelLayout(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            data_parallel_size=2,
            has_distributed_optimizer=False,
        ),
        4,
        "none",
        1.3286,
    ),
    "tp4 pp2 distributed optimizer": (
        ParallelLayout(tensor_model_parallel_size=4, pipeline_model_parallel_size=2),
        8,
        "none",
        0.7863,
    ),
    "tp2 cp2 sequence parallel": (
        ParallelLayout(
            tensor_model_parallel_size=2,
            context_parallel_size=2,
            data_parallel_size=2,
            has_sequence_parallel=True,
            has_distributed_optimizer=False,
        ),
        4,
        "none",
        1.1366,
    ),
    "tp2 pp2 cp2 sequence parallel": (
        ParallelLayout(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            context_parallel_size=2,
            has_sequence_parallel=True,
            has_distributed_optimizer=False,
        ),
        8,
        "none",
        0.8710,
    ),
}


@pytest.mark.parametrize("layout, num_microbatches, recompute, peak_gib", CI_PEAKS_GIB.values(), ids=CI_PEAKS_GIB)
def test_peaks_recorded_by_megatron_lm(layout, num_microbatches, recompute, peak_gib):
    has_dropout = layout.context_parallel_size == 1
    stages = estimate_memory(
        CI_GPT,
        layout,
        micro_batch_size=4,
        seq_length=1024,
        num_microbatches=num_microbatches,
        options=MemoryOptions(recompute=recompute, has_hidden_dropout=has_dropout, has_attention_dropout=has_dropout),
    )
    # Megatron-LM logs the last rank. The largest measured difference is -3.0% (tp2 cp2); the others lie within 2.7%.
    assert stages[-1].allocated_bytes / GIB == pytest.approx(peak_gib, rel=0.032)


def test_peak_of_a_15b_model_recorded_by_megatron_lm():
    model = dataclasses.replace(
        GPT_22B,
        num_layers=32,
        num_attention_heads=48,
        num_query_groups=8,
        vocab_size=256_000,
        position_embedding_type="rope",
        has_linear_bias=False,
        has_tied_embeddings=False,
    )
    (stage,) = estimate_memory(
        model,
        dataclasses.replace(TP8_SP, data_parallel_size=24, has_distributed_optimizer=True),
        micro_batch_size=4,
        seq_length=4096,
        num_microbatches=4,
    )
    # 26.226 GiB at the peak, 12.358 at the end; 24 model copies are not stated but follow from the latter.
    assert (stage.state_bytes + stage.buffers_bytes) / GIB == pytest.approx(12.358, rel=0.01)
    assert stage.allocated_bytes / GIB == pytest.approx(26.226, rel=0.01)


def estimate_hammer(layout=None, context_bytes=CUDA_CONTEXT_BYTES, fragmentation_ratio=0.1, **options):
    preset = PRESETS["hammer-1b4"]
    return estimate_memory(
        preset.model,
        layout or build_layout(preset.recipe, data_parallel_size=8),
        micro_batch_size=8,
        seq_length=2048,
        num_microbatches=16,
        options=MemoryOptions(**options),
        context_bytes=context_bytes,
        fragmentation_ratio=fragmentation_ratio,
    )


def test_bytes_a_parameter():
    (bf16,), (fp32,) = estimate_hammer(), estimate_hammer(precision="fp32")
    parameters = 1_402_562_560  # vocabulary padded to 105,856
    assert (bf16.weights_bytes, bf16.gradients_bytes, bf16.optimizer_bytes) == (
        2 * parameters,
        4 * parameters,
        12 * parameters // 8,
    )
    assert (fp32.weights_bytes, fp32.gradients_bytes, fp32.optimizer_bytes) == (
        4 * parameters,
        4 * parameters,
        8 * parameters // 8,
    )


def test_logits_are_six_bytes_in_bf16_and_four_in_fp32():
    (bf16,), (fp32,) = estimate_hammer(), estimate_hammer(precision="fp32")
    assert bf16.logits_bytes == 6 * 8 * 2048 * 105_856
    assert fp32.logits_bytes == 4 * 8 * 2048 * 105_856


def test_hammer_fits_its_published_machine_with_room_to_spare():
    (stage,) = estimate_hammer()
    assert 40 * GIB < stage.total_bytes < 60 * GIB  # 8 x A100 80 GB, micro-batch 8


def test_total_is_the_sum_of_every_byte_field():
    (stage,) = estimate_hammer()
    fields = dataclasses.asdict(stage)
    sizes = {name: size for name, size in fields.items() if name.endswith("_bytes") and name != "host_bytes"}
    assert stage.total_bytes == sum(sizes.values()) == sum(stage.list_parts().values())


def test_allowances_can_be_switched_off_for_cpu_processes():
    (stage,) = estimate_hammer(context_bytes=0, fragmentation_ratio=0.0)
    assert stage.context_bytes == stage.fragmentation_bytes == 0


def test_more_recomputation_needs_less_memory():
    none, selective, full = (estimate_hammer(recompute=mode)[0] for mode in ("none", "selective", "full"))
    assert full.activations_bytes < selective.activations_bytes < none.activations_bytes
    # flash attention keeps nothing quadratic, so there is almost nothing for selective recomputation to save
    assert selective.activations_bytes == pytest.approx(none.activations_bytes, rel=0.005)
    hidden = 2 * 8 * 2048 * 2048
    assert full.activations_bytes < 22 * hidden + none.activations_bytes / 22 + 3 * hidden


def test_sequence_parallelism_divides_what_tensor_parallelism_repeats():
    layout = ParallelLayout(tensor_model_parallel_size=4, data_parallel_size=2)
    (repeated,) = estimate_hammer(layout=layout)
    (divided,) = estimate_hammer(layout=dataclasses.replace(layout, has_sequence_parallel=True))
    (alone,) = estimate_hammer()
    assert divided.activations_bytes == pytest.approx(alone.activations_bytes / 4, rel=0.001)
    assert repeated.activations_bytes > 1.5 * divided.activations_bytes
    assert repeated.logits_bytes == pytest.approx(alone.logits_bytes / 4, rel=0.01)


def test_context_parallelism_divides_tokens():
    (whole,), (half,) = (
        estimate_hammer(),
        estimate_hammer(layout=ParallelLayout(context_parallel_size=2, data_parallel_size=4)),
    )
    assert 2 * half.activations_bytes == whole.activations_bytes
    assert 2 * half.logits_bytes == whole.logits_bytes
    assert half.optimizer_bytes == whole.optimizer_bytes


def test_each_pipeline_stage_counts_its_own_parts():
    stages = estimate_hammer(layout=ParallelLayout(pipeline_model_parallel_size=2, data_parallel_size=4))
    assert [stage.num_layers for stage in stages] == [11, 11]
    assert [stage.num_in_flight for stage in stages] == [2, 1]
    assert stages[0].logits_bytes == 0 < stages[1].logits_bytes


@pytest.mark.parametrize(
    "pp, vp, num_microbatches, in_flight",
    [
        (1, 1, 8, [1]),
        (4, 1, 8, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        (4, 2, 8, [11, 9, 7, 5]),  # warm-up 2 (p - r - 1) + (v - 1) p, and the current one
        (4, 3, 4, [12, 12, 11, 9]),
    ],
)
def test_micro_batches_in_flight(pp, vp, num_microbatches, in_flight):
    layout = ParallelLayout(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vp)
    assert [count_in_flight(layout, rank, num_microbatches) for rank in range(pp)] == in_flight


@pytest.mark.parametrize(
    "chunk_sizes, num_in_flight, num_microbatches, alive",
    [
        ((2, 2), 5, 8, 10),
        ((1, 0), 5, 4, 4),  # four micro-batches through the first chunk, then one through the empty one
        ((1, 0), 5, 8, 5),  # the fifth enters the first chunk before the first leaves it
        ((0, 1), 11, 4, 4),
        ((3,), 4, 8, 12),
    ],
)
def test_layers_alive_in_uneven_chunks(chunk_sizes, num_in_flight, num_microbatches, alive):
    layout = ParallelLayout(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=len(chunk_sizes))
    assert count_alive(layout, chunk_sizes, num_in_flight, num_microbatches) == alive


def test_interleaving_costs_the_papers_factor():
    def first_stage(vp):
        layout = ParallelLayout(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=vp)
        model = PRESETS["llama2-7b"].model
        return estimate_memory(model, layout, micro_batch_size=1, seq_length=4096, num_microbatches=64)[0]

    # 1 + (p - 1) / (p m) of the micro-batches of 1F1B (Korthikanti et al. 2022, section 5.2.1)
    factor = first_stage(4).activations_bytes / first_stage(1).activations_bytes
    assert factor == pytest.approx(1 + 3 / (4 * 4), rel=0.01)


def test_experts_are_shared_out():
    preset = PRESETS["tiny-llm-zh-moe"]

    def estimate(ep):
        layout = ParallelLayout(data_parallel_size=4, expert_model_parallel_size=ep)
        return estimate_memory(preset.model, layout, micro_batch_size=4, seq_length=1024, num_microbatches=2)[0]

    assert estimate(4).weights_bytes < estimate(1).weights_bytes
    assert estimate(4).activations_bytes == estimate(1).activations_bytes  # balanced load
    assert estimate(4).optimizer_bytes == pytest.approx(estimate(1).optimizer_bytes, abs=24)


def test_the_worst_moment_of_a_step():
    batch = {"micro_batch_size": 8, "seq_length": 2048, "num_microbatches": 16}
    model = PRESETS["hammer-1b4"].model
    # With the loss in place the head's backward pass needs more than the loss; without a head a layer's does.
    (loss,) = estimate_memory(model, ParallelLayout(), **batch)
    (head,) = estimate_memory(model, ParallelLayout(), **batch, options=MemoryOptions(cross_entropy="in-place"))
    first, _ = estimate_memory(model, ParallelLayout(pipeline_model_parallel_size=2), **batch)
    logits, hidden = 8 * 2048 * 105_856, 2 * 8 * 2048 * 2048
    assert (loss.logits_bytes, loss.transient_bytes) == (6 * logits, 0)
    assert (head.logits_bytes, head.transient_bytes) == (2 * logits, hidden)
    assert (first.logits_bytes, first.transient_bytes) == (0, 2 * 8 * 2048 * 2 * 5632 + hidden)
    (full,) = estimate_memory(model, ParallelLayout(), **batch, options=MemoryOptions(recompute="full"))
    # At the loss no layer is being recomputed: 22 inputs, those of the final norm and the head, and the token ids.
    assert full.activations_bytes == 24 * hidden + 8 * 8 * 2048


def test_logits_of_the_losses_at_the_head():
    """hammer-1b4 at micro-batch 8: 10.4 GB with Megatron's loss, 3.5 GB in place, 0.9 GB in chunks of 4,096 tokens."""
    model, layout, batch = PRESETS["hammer-1b4"].model, ParallelLayout(), Batch(micro_batch_size=8, seq_length=2048)
    unfused, in_place, chunked = (
        estimate_head(model, layout, batch, MemoryOptions(cross_entropy=loss, has_fused_weight_gradients=False))
        for loss in ("unfused", "in-place", "chunked")
    )
    assert unfused.loss_logits == 6 * 8 * 2048 * 105_856
    assert in_place.loss_logits == in_place.backward_logits == 2 * 8 * 2048 * 105_856
    assert chunked.loss_logits == chunked.backward_logits == 2 * 4096 * 105_856
    # One weight gradient for the sum over the chunks, one for the chunk.
    assert chunked.backward_transient - in_place.backward_transient == 2 * 105_856 * 2048
    short = dataclasses.replace(batch, micro_batch_size=2)
    assert estimate_head(model, layout, short, MemoryOptions(cross_entropy="chunked")) == estimate_head(
        model, layout, short, MemoryOptions(cross_entropy="in-place")
    )


def test_heaviest_stage_of_many():
    model, layout = PRESETS["llama2-7b"].model, ParallelLayout(pipeline_model_parallel_size=8)
    batch = {"micro_batch_size": 1, "seq_length": 4096, "num_microbatches": 32}
    stages = estimate_memory(model, layout, **batch)
    heaviest = estimate_memory(model, layout, **batch, only_heaviest=True)
    assert set(heaviest) <= set(stages)
    assert max(stage.total_bytes for stage in heaviest) == max(stage.total_bytes for stage in stages)


def test_an_impossible_layout_is_refused():
    with pytest.raises(ConfigError, match=r"must divide num_layers, got pp=4\b"):
        estimate_hammer(layout=ParallelLayout(pipeline_model_parallel_size=4))
    with pytest.raises(ConfigError, match=r"must divide num_attention_heads, got tp=3\b"):
        estimate_hammer(layout=ParallelLayout(tensor_model_parallel_size=3))


def test_norms_of_queries_and_keys_keep_their_inputs():
    model = PRESETS["hammer-1b4"].model
    plain = count_layer_activation_bytes(model, ParallelLayout(), num_tokens=100)
    normed = count_layer_activation_bytes(
        dataclasses.replace(model, has_qk_norm=True), ParallelLayout(), num_tokens=100
    )
    assert normed - plain == 100 * 2 * (32 + 4) * 64


@pytest.mark.parametrize(
    "method, num_layers, kept_layers, whole_layers",
    [
        ("uniform", None, 22, 1),
        ("uniform", 11, 2, 11),  # one input for 11 layers, which are made again at once
        ("block", None, 22, 1),
        ("block", 22, 22, 1),
        ("block", 2, 2, 21),  # 20 layers keep everything, and one of the others is made again
        ("block", 0, 0, 22),
    ],
)
def test_units_of_full_recomputation(method, num_layers, kept_layers, whole_layers):
    model, layout = PRESETS["hammer-1b4"].model, ParallelLayout(pipeline_model_parallel_size=1)
    whole = count_layer_activation_bytes(model, layout, num_tokens=8 * 2048)
    options = MemoryOptions(
        recompute="full",
        recompute_method=method,
        recompute_num_layers=num_layers,
        cross_entropy="te",  # so that a layer's backward pass is the worst moment
    )
    tokens = 8 * 2048
    (stage,) = estimate_memory(
        dataclasses.replace(model, vocab_size=128),
        layout,
        micro_batch_size=8,
        seq_length=2048,
        num_microbatches=1,
        options=options,
    )
    expected = kept_layers * 2 * tokens * model.hidden_size + whole_layers * whole + 8 * tokens
    # The input of a layer that is made again counts once: among those kept.
    remade = 0 if method == "block" and num_layers == 0 else 1
    assert stage.activations_bytes == pytest.approx(expected - remade * 2 * tokens * model.hidden_size, rel=1e-6)


def test_layers_for_further_tokens_stand_behind_the_last_stage():
    model = PRESETS["hammer-1b4"].model
    layout = ParallelLayout(pipeline_model_parallel_size=2)
    step = {"micro_batch_size": 1, "seq_length": 2048, "num_microbatches": 4}
    plain = estimate_memory(model, layout, **step)
    further = estimate_memory(dataclasses.replace(model, num_mtp_layers=1), layout, **step)
    assert further[0] == plain[0]
    assert (further[1].num_layers, plain[1].num_layers) == (12, 11)
    # A layer, a projection and three norms, and a copy of the embedding.
    parameters = sum(tensor.numel for tensor in layer_tensors(model)) + 2 * 2048**2 + 3 * 2048 + 105_856 * 2048
    assert further[1].gradients_bytes - plain[1].gradients_bytes == 4 * parameters
    hidden, logits = 2 * 2048 * 2048, 2048 * 105_856
    batch, options = Batch(micro_batch_size=1, seq_length=2048), MemoryOptions()
    kept = count_layer_activation_bytes(model, layout, num_tokens=2048) + 5 * hidden
    assert further[1].activations_bytes - plain[1].activations_bytes == kept
    assert further[1].logits_bytes - plain[1].logits_bytes == 4 * logits  # softmax in fp32, until its backward pass
    assert estimate_head(model, layout, batch, options).loss_logits == 6 * logits


def test_peak_of_latent_attention_and_experts_recorded_by_simumax():
    """MooreThreads/SimuMax docs/b200, release 1.2: four layers of DeepSeek-V2 on 8 B200, 44.7 GiB allocated.

    tp 1, ep 4, pp 2, 4 micro-batches of one sequence of 4096, TransformerEngine's fused loss, 50 MiB of workspaces.
    """
    model = ModelShape(
        name="DeepSeek-V2, 4 layers",
        source="deepseek-ai/DeepSeek-V2",
        num_layers=4,
        hidden_size=5120,
        ffn_hidden_size=12288,
        num_attention_heads=128,
        num_query_groups=128,
        vocab_size=102_400,
        max_position_embeddings=4096,
        has_qk_norm=True,
        latent_attention=LatentAttention(
            q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128
        ),
        moe=MoeShape(
            num_experts=160,
            router_topk=6,
            ffn_hidden_size=1536,
            shared_expert_intermediate_size=3072,
            dense_layers=(0,),
        ),
    )
    layout = ParallelLayout(pipeline_model_parallel_size=2, data_parallel_size=4, expert_model_parallel_size=4)
    stages = estimate_memory(
        model,
        layout,
        micro_batch_size=1,
        seq_length=4096,
        num_microbatches=4,
        options=MemoryOptions(cross_entropy="te", workspace_bytes=50 * 2**20),
    )
    assert max(stage.allocated_bytes for stage in stages) == pytest.approx(44.7 * GIB, rel=0.01)  # 0.7% less
