"""The predicted step: its parts, the effect of each choice of a plan, and published runs."""

import dataclasses
import time

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout, count_flops_per_token
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.coefficients import build_prior_coefficients, load_coefficients
from megatron_hammer.scaling.cost.step_time import predict_step, select_band_class, select_band_ratio
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_gpu
from megatron_hammer.scaling.plan import PARTS, Plan, StepTime

PRIORS = build_prior_coefficients()
LLAMA_8B, LLAMA_70B = PRESETS["llama3-8b"].model, PRESETS["llama3-70b"].model


def build_plan(**changes) -> Plan:
    """Llama-3 8B on a node of H100; names of ParallelLayout go to its layout."""
    layout_names = {field.name for field in dataclasses.fields(ParallelLayout)}
    layout = {"data_parallel_size": 8} | {name: value for name, value in changes.items() if name in layout_names}
    plan = {
        "model": LLAMA_8B,
        "gpu": select_gpu("h100-sxm"),
        "cluster": select_cluster("dgx-h100"),
        "seq_length": 8192,
        "micro_batch_size": 1,
        "global_batch_size": 128,
    } | {name: value for name, value in changes.items() if name not in layout_names}
    return Plan(layout=ParallelLayout(**layout), **plan)


def predict(**changes) -> StepTime:
    return predict_step(build_plan(**changes), PRIORS)


def test_the_parts_add_up_to_the_step_and_the_band_contains_it():
    step = predict(tensor_model_parallel_size=2, data_parallel_size=4, has_sequence_parallel=True)
    assert step.total_s == pytest.approx(sum(getattr(step, name) for name in PARTS))
    assert all(getattr(step, name) >= 0 for name in PARTS)
    assert step.low_s < step.total_s < step.high_s
    assert step.low_s * step.high_s == pytest.approx(step.total_s**2)


def test_twice_the_batch_is_twice_the_micro_batches():
    once, twice = predict(), predict(global_batch_size=256)
    assert twice.matmul_s == pytest.approx(2 * once.matmul_s)
    assert twice.optimizer_s == once.optimizer_s
    assert 1.9 * once.total_s < twice.total_s < 2 * once.total_s


def test_full_recomputation_repeats_the_forward_pass():
    step, full = predict(), predict(recompute="full")
    layers_s = step.matmul_s + step.attention_s + step.pointwise_s
    assert 0.28 * layers_s < full.recompute_s < 0.4 * layers_s
    selective = predict(recompute="selective")
    assert 0 < selective.recompute_s < 0.35 * step.attention_s
    assert step.recompute_s == 0


def test_a_share_of_the_layers_is_recomputed():
    none, quarter, whole = predict(), predict(recompute="full", recompute_num_layers=8), predict(recompute="full")
    assert quarter.recompute_s == pytest.approx(whole.recompute_s / 4)
    assert none.total_s < quarter.total_s < whole.total_s
    assert predict(recompute="full", recompute_num_layers=32).total_s == pytest.approx(whole.total_s)


def test_fp8_speeds_up_matrix_products_only():
    wide, narrow = predict(), predict(precision="fp8")
    assert narrow.matmul_s < 0.65 * wide.matmul_s
    assert narrow.attention_s == wide.attention_s
    assert narrow.pointwise_s > wide.pointwise_s
    assert narrow.embedding_and_loss_s == wide.embedding_and_loss_s


def test_tensor_parallelism_over_nodes_costs_far_more_than_inside_one():
    shared = {"model": LLAMA_70B, "data_parallel_size": 1, "has_sequence_parallel": True}
    inside = predict(tensor_model_parallel_size=8, **shared)
    outside = predict(tensor_model_parallel_size=16, **shared)
    assert outside.tensor_parallel_s > inside.tensor_parallel_s
    assert outside.total_s > 0.5 * 1.3 * inside.total_s  # 16 GPUs are far from halving what 8 take


def test_overlap_hides_a_part_of_tensor_parallel_communication():
    shared = {"tensor_model_parallel_size": 4, "data_parallel_size": 2, "has_sequence_parallel": True}
    shown, hidden = predict(**shared), predict(**shared, overlaps_tensor_parallel=True)
    ratio = hidden.tensor_parallel_s / shown.tensor_parallel_s
    assert ratio == pytest.approx(PRIORS.tensor_exposed_ratio)


def test_gradients_and_parameters_overlap_with_passes_only_where_allowed():
    hidden = predict(data_parallel_size=64, global_batch_size=64)
    shown = predict(
        data_parallel_size=64, global_batch_size=64, overlaps_grad_reduce=False, overlaps_param_gather=False
    )
    assert hidden.data_parallel_s < 0.5 * shown.data_parallel_s
    half = predict(
        data_parallel_size=64,
        global_batch_size=64,
        overlaps_grad_reduce=False,
        overlaps_param_gather=False,
        gradient_bytes=2,
    )
    assert half.data_parallel_s == pytest.approx(shown.data_parallel_s * 4 / 6, rel=0.01)


def test_fully_sharded_parameters_are_gathered_for_every_micro_batch():
    few = predict(sharding="fsdp", data_parallel_size=64, global_batch_size=64)
    many = predict(sharding="fsdp", data_parallel_size=64, global_batch_size=256)
    assert many.data_parallel_s == pytest.approx(4 * few.data_parallel_s)
    apart = predict(sharding="fsdp", data_parallel_size=64, global_batch_size=64, shard_size=8)
    assert apart.optimizer_s > few.optimizer_s


def test_chunks_shrink_the_bubble_and_many_micro_batches_do_too():
    shared = {"model": LLAMA_70B, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4}
    shared |= {"data_parallel_size": 1, "has_sequence_parallel": True}
    plain, chunked = predict(**shared), predict(**shared, virtual_pipeline_model_parallel_size=5)
    assert chunked.bubble_s == pytest.approx(plain.bubble_s / 5, rel=0.05)
    short = predict(**shared, global_batch_size=8)
    assert short.bubble_s / short.total_s > 4 * plain.bubble_s / plain.total_s


def test_a_tied_embedding_is_summed_over_both_ends_of_a_pipeline():
    model = dataclasses.replace(LLAMA_8B, has_tied_embeddings=True)
    shared = {"pipeline_model_parallel_size": 2, "data_parallel_size": 8, "overlaps_grad_reduce": False}
    apart = predict(**shared)
    assert predict(**shared, model=model).data_parallel_s > apart.data_parallel_s


def test_experts_and_contexts_have_parts_of_their_own():
    experts = predict(
        model=PRESETS["tiny-llm-zh-moe"].model, expert_model_parallel_size=8, data_parallel_size=8, global_batch_size=64
    )
    assert experts.expert_parallel_s > 0
    assert experts.context_parallel_s == 0
    long = predict(context_parallel_size=8, data_parallel_size=1, seq_length=65536, global_batch_size=8)
    assert 0 < long.context_parallel_s < 0.1 * long.attention_s


def test_jitter_grows_with_the_logarithm_of_the_nodes():
    one, many = predict(), predict(data_parallel_size=1024, global_batch_size=128 * 128)
    assert one.jitter_s == 0
    assert many.jitter_s / (many.total_s - many.jitter_s) == pytest.approx(PRIORS.jitter_ratio * 4.852, rel=1e-3)


def test_more_processes_than_cores_share_them_and_waiting_ones_leave_theirs():
    cluster = dataclasses.replace(select_cluster("cpu-host"), gpus_per_node=8, full_speed_processes_per_node=2)
    shared = {"gpu": select_gpu("cpu-core"), "cluster": cluster, "precision": "fp32", "global_batch_size": 8}
    shared |= {"model": PRESETS["hammer-tiny"].model, "seq_length": 256, "overlaps_grad_reduce": False}
    shared |= {"overlaps_param_gather": False}
    two = predict(data_parallel_size=2, **shared)
    four = predict(data_parallel_size=4, **(shared | {"global_batch_size": 16}))
    assert 1.9 * two.matmul_s < four.matmul_s < 2.1 * two.matmul_s
    piped = predict(pipeline_model_parallel_size=4, data_parallel_size=1, **shared)
    alone = dataclasses.replace(cluster, full_speed_processes_per_node=None)
    free = predict(pipeline_model_parallel_size=4, data_parallel_size=1, **(shared | {"cluster": alone}))
    assert 1 < piped.total_s / free.total_s < 1.8


def test_a_plan_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="pipeline-model-parallel-size: must divide num_layers, got pp=5"):
        predict(pipeline_model_parallel_size=5)
    with pytest.raises(ConfigError, match="precision: must be one that the GPU multiplies in, got precision=fp8"):
        predict(gpu=select_gpu("a100-sxm-80gb"), cluster=select_cluster("dgx-a100"), precision="fp8")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "hopper_16_bit"),
        ({"precision": "fp8"}, "hopper_low_precision"),
        ({"sharding": "fsdp"}, "fsdp"),
        ({"has_flash_attention": False}, "unfused_attention"),
        ({"gpu": select_gpu("a100-sxm-80gb")}, "ampere_16_bit"),
        ({"gpu": select_gpu("cpu-core"), "cluster": select_cluster("cpu-host")}, "cpu"),
    ],
)
def test_the_class_of_a_plan_chooses_its_band(changes, expected):
    plan = build_plan(**changes)
    assert select_band_class(plan) == expected
    wide = dataclasses.replace(PRIORS, band_ratio={"default": 0.1, expected: 0.7})
    step = predict_step(plan, wide)
    assert step.high_s / step.low_s == pytest.approx(2.71828**1.4, rel=1e-4)


@pytest.mark.parametrize(("recompute", "mfu"), [("selective", 0.542), ("full", 0.421)])
def test_gpt_530b_on_2240_a100_reaches_what_its_authors_published(recompute, mfu):
    """Korthikanti et al. 2022, arXiv 2205.05198, abstract; layout of its section 6. Not among the fitted runs."""
    model = dataclasses.replace(
        LLAMA_8B,
        num_layers=105,
        hidden_size=20480,
        ffn_hidden_size=4 * 20480,
        num_attention_heads=128,
        num_query_groups=128,
        vocab_size=51200,
        activation="gelu_tanh",
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        has_linear_bias=True,
        has_tied_embeddings=True,
        kv_channels=None,
    )
    layout = ParallelLayout(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=35,
        virtual_pipeline_model_parallel_size=3,
        data_parallel_size=8,
        has_sequence_parallel=recompute == "selective",
    )
    plan = Plan(
        model=model,
        layout=layout,
        gpu=select_gpu("a100-sxm-80gb"),
        cluster=select_cluster("dgx-a100"),
        seq_length=2048,
        micro_batch_size=1,
        global_batch_size=2240,
        precision="fp16",
        recompute=recompute,
        sharding="none",
        has_flash_attention=False,
        overlaps_grad_reduce=False,
        overlaps_param_gather=False,
        gradient_bytes=2,
    )
    flops = count_flops_per_token(model, 2048, "B") * plan.tokens_per_step
    predicted = flops / predict_step(plan, load_coefficients()).total_s / 2240 / 312e12
    assert predicted == pytest.approx(mfu, rel=0.08)


def test_a_prediction_takes_less_than_two_milliseconds():
    layouts = [
        {"tensor_model_parallel_size": tp, "data_parallel_size": dp, "global_batch_size": 64 * dp}
        for tp in (1, 2, 4, 8)
        for dp in range(1, 26)
    ]
    plans = [build_plan(**layout, has_sequence_parallel=True) for layout in layouts]
    predict_step(plans[0], PRIORS)
    started_s = time.process_time()
    for plan in plans:
        predict_step(plan, PRIORS)
    assert (time.process_time() - started_s) / len(plans) < 2e-3  # about 0.1 ms on a free core


def test_the_band_of_a_model_with_experts_is_that_of_its_class_or_of_all_of_them():
    plan = build_plan(model=PRESETS["qwen3-30b-a3b"].model, expert_model_parallel_size=8)
    bands = {"default": 0.1, "experts": 0.3, "hopper_experts": 0.2}
    assert select_band_class(plan) == "hopper_experts"
    assert select_band_ratio(plan, dataclasses.replace(PRIORS, band_ratio=bands)) == 0.2
    del bands["hopper_experts"]
    assert select_band_ratio(plan, dataclasses.replace(PRIORS, band_ratio=bands)) == 0.3
    assert select_band_ratio(plan, dataclasses.replace(PRIORS, band_ratio={"default": 0.1})) == 0.1
