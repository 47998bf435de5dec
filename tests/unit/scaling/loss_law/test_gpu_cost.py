"""GPU time per token from projections: proportional from one size, a power law from several; wrong numbers of GPUs."""

from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout, estimate_memory
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.hardware.catalogue import select_cluster, select_default_cluster, select_gpu
from megatron_hammer.scaling.loss_law.gpu_cost import read_gpu_cost
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.report.projection_file import build_projection_document, format_json
from megatron_hammer.scaling.search.projection import Projection, SizeProjection, Study, StudyResult
from tests.helpers.messages import raises_problem


def write_projection(path: Path, preset: str, *gpu_counts: int) -> tuple[Path, list[float]]:
    """A projection of plain data parallelism, and its GPU-seconds per token at each number of GPUs."""
    model, gpu = PRESETS[preset].model, select_gpu("h100-sxm")
    cluster = select_cluster(select_default_cluster(gpu.name).name)
    sizes, costs = [], []
    for num_gpus in gpu_counts:
        plan = Plan(
            model=model,
            layout=ParallelLayout(data_parallel_size=num_gpus, has_distributed_optimizer=True),
            gpu=gpu,
            cluster=cluster,
            seq_length=1024,
            micro_batch_size=1,
            global_batch_size=64,
        )
        step = predict_step(plan)
        memory = estimate_memory(model, plan.layout, micro_batch_size=1, seq_length=1024, num_microbatches=1)[0]
        projection = Projection(plan=plan, step=step, memory=memory)
        costs.append(1 / projection.tokens_per_s_per_gpu)
        sizes.append(
            SizeProjection(num_gpus=num_gpus, global_batch_size=64, num_candidates=1, projections=(projection,))
        )
    study = Study(
        model=model,
        preset=preset,
        hf_config=None,
        gpu=gpu,
        cluster=cluster,
        gpu_counts=gpu_counts,
        seq_length=1024,
        precision="bf16",
        global_batch_size=64,
        memory_limit_bytes=gpu.memory_bytes,
    )
    result = StudyResult(study=study, sizes=tuple(sizes), knee=None, provenance={})
    path.write_text(format_json(build_projection_document(result)), encoding="utf-8")
    return path, costs


def test_one_size_is_taken_in_proportion(tmp_path: Path) -> None:
    path, (cost_8, cost_64) = write_projection(tmp_path / "p.json", "tinyllama-1b1", 8, 64)
    size = PRESETS["tinyllama-1b1"].num_parameters
    for num_gpus, seconds in ((8, cost_8), (64, cost_64)):
        cost = read_gpu_cost([path], num_gpus, "total")
        assert cost.estimate(size, 1000) == pytest.approx(1000 * seconds)
        assert cost.estimate(2 * size, 1) == pytest.approx(2 * seconds)
        assert cost.unit == "GPU-seconds"
        assert cost.definition.startswith(f"GPU time projected for tinyllama-1b1 on {num_gpus} h100-sxm (step times ")
    assert cost_64 > cost_8


def test_several_sizes_give_a_power(tmp_path: Path) -> None:
    small, (small_cost,) = write_projection(tmp_path / "s.json", "gpt2-124m", 8)
    large, (large_cost,) = write_projection(tmp_path / "l.json", "tinyllama-1b1", 8)
    cost = read_gpu_cost([small, large], None, "non-embedding")
    sizes = PRESETS["gpt2-124m"].num_parameters - (50_257 + 1024) * 768, 1_100_048_384 - 2 * 32_000 * 2048
    assert cost.estimate(sizes[0], 1) == pytest.approx(small_cost)
    assert cost.estimate(sizes[1], 1) == pytest.approx(large_cost)
    assert 0 < cost.exponent < 1.1  # below one: small layers do not fill the GPU
    assert cost.definition.endswith(" per token (through two sizes)")


def test_a_number_of_gpus_must_be_projected(tmp_path: Path) -> None:
    path, _ = write_projection(tmp_path / "p.json", "gpt2-124m", 8, 64)
    for num_gpus, wanted in ((None, "one number of GPUs"), (16, "16 GPUs")):
        with raises_problem(ConfigError, f"{path}:", f"for {wanted}", "got 8, 64", "--projection-gpus"):
            read_gpu_cost([path], num_gpus, "total")
