"""Questions of a planner: what an expert would demand of the layout to start from, whatever the exact sizes are."""

from dataclasses import replace

import pytest

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_default_cluster, select_gpu
from megatron_hammer.scaling.plan import Precision
from megatron_hammer.scaling.plan_memory import estimate_heaviest_plan_stage
from megatron_hammer.scaling.search.projection import Projection, SizeProjection, Study, estimate_mfu_ratio
from megatron_hammer.scaling.search.reference import find_references, list_published_runs
from megatron_hammer.scaling.search.search import Search

USABLE_RATIO = 0.95


def build_study(
    model: ModelShape, gpu_name: str, num_gpus: int, *, batch: int, seq_length: int, precision: Precision = "bf16"
) -> Study:
    gpu = select_gpu(gpu_name)
    return Study(
        model=model,
        preset=None,
        hf_config=None,
        gpu=gpu,
        cluster=select_default_cluster(gpu_name),
        gpu_counts=(num_gpus,),
        seq_length=seq_length,
        precision=precision,
        global_batch_size=batch,
        memory_limit_bytes=round(USABLE_RATIO * gpu.memory_bytes),
    )


def answer(study: Study) -> SizeProjection:
    size = Search(predict=predict_step).search_plans(study, study.gpu_counts[0])
    assert size.projections, size.problem
    return size


def demand(size: SizeProjection, least_mfu: float, most_mfu: float, *, may_be_unpublished: bool = False) -> Projection:
    """What holds for every answer: the layout to start from, if an expert would accept it."""
    start = size.projections[0]
    assert start.standing.is_tied
    fastest_s = min(one.step.total_s for one in size.projections)
    assert start.step.total_s <= 1.08 * fastest_s
    assert least_mfu < estimate_mfu_ratio(start, "A") < most_mfu
    assert start.plan.layout.tensor_model_parallel_size <= start.plan.cluster.nvlink_domain_size
    # Of ties, one that has room.
    if any(one.standing.is_tied and not one.standing.cautions for one in size.projections):
        assert not start.standing.cautions
    elif not may_be_unpublished:
        assert all("published" not in caution for caution in start.standing.cautions)
    # The list has other ideas and no near copies.
    kinds = {
        (
            one.plan.layout.tensor_model_parallel_size,
            one.plan.layout.pipeline_model_parallel_size,
            one.plan.layout.expert_model_parallel_size,
            one.plan.layout.expert_tp,
            one.plan.sharding,
            one.plan.shard_size,
        )
        for one in size.projections
    }
    assert len(kinds) == len(size.projections) == 5
    assert 0.5 < sum(one.standing.chance_of_best for one in size.projections) <= 1.0 + 1e-9
    return start


def test_1b4_on_64_h100_needs_data_parallelism_only() -> None:
    model = select_preset("hammer-1b4").model
    start = demand(answer(build_study(model, "h100-sxm", 64, batch=1024, seq_length=2048)), 0.35, 0.55)
    assert start.plan.layout.data_parallel_size == 64
    assert start.plan.sharding == "distributed_optimizer"
    assert start.plan.recompute == "none"
    # FSDP with larger micro-batches is at most a little faster, and needs far more memory.
    assert start.memory.total_bytes < 0.6 * start.plan.gpu.memory_bytes


def test_70b_on_2048_h200() -> None:
    model = select_preset("llama3-70b").model
    start = demand(answer(build_study(model, "h200-sxm", 2048, batch=2048, seq_length=8192)), 0.38, 0.58)
    layout = start.plan.layout
    assert 1 < layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size <= 64
    assert layout.tensor_model_parallel_size <= 8
    assert start.plan.recompute == "none"


def test_405b_on_16k_gb200_in_fp8() -> None:
    small = select_preset("llama3-70b").model
    model = replace(
        small, name="llama3-405b", num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_attention_heads=128
    )
    size = answer(build_study(model, "gb200", 16384, batch=2048, seq_length=8192, precision="fp8"))
    start = demand(size, 0.25, 0.5, may_be_unpublished=True)
    layout = start.plan.layout
    assert layout.tensor_model_parallel_size >= 2
    assert layout.pipeline_model_parallel_size >= 2
    # A shard over thousands of ranks is what nobody has shown.
    assert start.plan.sharding != "fsdp" or start.plan.layout.dense_shard_size <= 2048


def test_qwen3_30b_a3b_on_512_h100_spreads_its_experts_inside_nodes() -> None:
    model = select_preset("qwen3-30b-a3b").model
    study = build_study(model, "h100-sxm", 512, batch=1024, seq_length=4096)
    size = answer(study)
    layout = demand(size, 0.1, 0.45).plan.layout
    assert 4 <= layout.expert_model_parallel_size <= 32
    assert layout.expert_tp == 1  # its experts are small
    assert layout.tensor_model_parallel_size <= 2
    # As many ranks of experts as NVIDIA publishes (on Blackwell) are among the ties.
    (reference,) = find_references(study, predict_step, estimate_heaviest_plan_stage)
    published = reference.run.plan.layout.expert_model_parallel_size
    ties = {one.plan.layout.expert_model_parallel_size for one in size.projections if one.standing.is_tied}
    assert published in ties


def test_deepseek_v3_on_512_h100_fits() -> None:
    runs = (run for run in list_published_runs() if run.model.lower() == "deepseek-v3")
    model = next(run.plan.model for run in runs)
    start = demand(answer(build_study(model, "h100-sxm", 512, batch=4096, seq_length=4096)), 0.1, 0.45)
    layout = start.plan.layout
    assert 8 <= layout.expert_model_parallel_size <= 64
    assert layout.pipeline_model_parallel_size > 1
    assert start.plan.sharding == "distributed_optimizer"
    assert layout.expert_tp == 1
    assert start.memory.total_bytes <= USABLE_RATIO * 80 * GIB


def test_8b_at_128k_on_256_h100_cuts_the_sequence() -> None:
    model = replace(select_preset("llama3-8b").model, max_position_embeddings=131_072)
    start = demand(answer(build_study(model, "h100-sxm", 256, batch=64, seq_length=131_072)), 0.3, 0.55)
    layout = start.plan.layout
    assert layout.context_parallel_size >= 2
    assert layout.context_parallel_size * layout.tensor_model_parallel_size >= 8
    assert start.plan.micro_batch_size == 1
    assert start.plan.recompute == "none"


@pytest.mark.parametrize("num_gpus", [64, 512])
def test_the_search_is_not_slower_than_nvidias_layout(num_gpus: int) -> None:
    """The published layout is one of the candidates, so the fastest of the search is at least as fast."""
    study = build_study(select_preset("llama3-70b").model, "h100-sxm", num_gpus, batch=512, seq_length=8192)
    size = answer(study)
    (reference,) = find_references(study, predict_step, estimate_heaviest_plan_stage)
    assert reference.projection is not None
    # The first row may give up 2 % of the fastest layout's speed, and more to avoid a caution.
    assert size.projections[0].step.total_s <= 1.05 * reference.projection.step.total_s
