"""Layouts beyond published runs, outside the NVLink domain or close to the memory's limit are marked."""

from dataclasses import replace

import pytest

from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.scaling.hardware.catalogue import select_cluster
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH
from megatron_hammer.scaling.search.published_reach import list_cautions, list_sizes, read_published_reach
from tests.helpers.toy_study import build_llama_plan

LIMIT = 76 * GIB


def build_plan(**layout: int) -> Plan:
    return build_llama_plan(layout=ParallelLayout(**layout), global_batch_size=16384)


def mark(plan: Plan, memory_gib: float = 40) -> tuple[str, ...]:
    return list_cautions(plan, round(memory_gib * GIB), memory_limit_bytes=LIMIT, memory_margin_ratio=0.1)


def test_a_usual_layout_has_no_mark() -> None:
    assert mark(build_plan(tensor_model_parallel_size=8, data_parallel_size=64)) == ()


def test_memory_within_the_margin_of_the_limit_is_marked() -> None:
    plan = build_plan(data_parallel_size=64)
    assert mark(plan, 69.0) == ()
    assert mark(plan, 69.2) == ("memory: 69.2 of 76.0 GiB",)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ({"data_parallel_size": 16384}, {"sharding": "fsdp"}, "16,384 ranks that FSDP shards over: at most "),
        ({"context_parallel_size": 256}, {}, "cp 256: at most "),
        ({"expert_model_parallel_size": 256, "data_parallel_size": 256}, {}, "ep 256: at most "),
        ({"pipeline_model_parallel_size": 64}, {}, "pp 64: at most "),
        ({"tensor_model_parallel_size": 16}, {}, "tp 16: beyond the NVLink domain of 8"),
    ],
)
def test_what_no_published_run_has_is_marked(layout: dict[str, int], changes: dict[str, str], words: str) -> None:
    cautions = mark(replace(build_plan(**layout), **changes))
    assert any(caution.startswith(words) for caution in cautions), cautions


def test_no_published_run_is_beyond_the_published_ones() -> None:
    runs = [run for path in (PUBLISHED_RUNS_PATH, PUBLISHED_MOE_PATH) for run in read_runs(path)[0]]
    assert {run.plan.model.moe is not None for run in runs} == {False, True}
    assert [run for run in runs if any("published" in caution for caution in mark(run.plan))] == []
    assert read_published_reach()[False]["fsdp"] == 2048  # PaxML on 2,048 H100
    assert read_published_reach()[False]["gpus"] == 16_384  # Llama 3 405B


def test_dense_models_say_nothing_of_mixtures() -> None:
    dense = replace(build_plan(data_parallel_size=2048), sharding="fsdp")
    assert mark(dense) == ()
    mixture = replace(dense, model=select_preset("qwen3-30b-a3b").model)
    assert any(caution.startswith("2,048 ranks that FSDP shards over") for caution in mark(mixture))
    # Published with 1,024 ranks, all of them with expert parallelism.
    small = replace(mixture, layout=ParallelLayout(data_parallel_size=512))
    (caution,) = mark(small)
    assert caution.startswith("512 ranks that FSDP shards an expert over: at most ")
    assert mark(replace(small, layout=replace(small.layout, expert_model_parallel_size=8))) == ()


def test_a_model_is_marked_that_fsdp_would_gather_in_larger_stages_than_any_published_run() -> None:
    """torchtitan trained DeepSeek-V3 under FSDP in two stages; nobody has published it in one."""
    runs = (run for run in read_runs(PUBLISHED_MOE_PATH)[0] if run.model.lower() == "deepseek-v3")
    model = next(run.plan.model for run in runs)
    layout = ParallelLayout(data_parallel_size=256, expert_model_parallel_size=32)
    one_stage = replace(build_plan(), model=model, layout=layout, sharding="fsdp")
    (caution,) = mark(one_stage)
    assert caution.startswith("671 billion parameters of one pipeline stage under FSDP: at most ")
    assert (
        mark(replace(one_stage, layout=replace(layout, pipeline_model_parallel_size=2, data_parallel_size=128))) == ()
    )
    assert mark(replace(one_stage, sharding="distributed_optimizer")) == ()


def test_sharding_inside_a_group_counts_its_ranks() -> None:
    plan = replace(build_plan(data_parallel_size=8192), sharding="fsdp", shard_size=64)
    assert list_sizes(plan)["fsdp"] == 64
    assert not any("FSDP" in caution for caution in mark(plan))


def test_cpu_processes_are_not_compared_with_clusters() -> None:
    plan = replace(build_plan(data_parallel_size=2), cluster=select_cluster("cpu-host"))
    assert list_cautions(plan, 2 * GIB, memory_limit_bytes=LIMIT, memory_margin_ratio=0.1) == ()
