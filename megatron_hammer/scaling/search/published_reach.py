"""How far published runs reach, and which layouts go beyond: nobody has shown that those work as predicted."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.byte_units import GIB
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.published.measured_runs import read_runs
from megatron_hammer.scaling.published.run_table import (
    PUBLISHED_LARGE_RUNS_PATH,
    PUBLISHED_MOE_PATH,
    PUBLISHED_RUNS_PATH,
)
from megatron_hammer.scaling.search.projection import MEMORY_CAUTION
from megatron_hammer.scaling.search.search_space import is_cpu_host

TABLES = (PUBLISHED_RUNS_PATH, PUBLISHED_LARGE_RUNS_PATH, PUBLISHED_MOE_PATH)
SIZE_NAMES = {
    "fsdp": "ranks that FSDP shards over",
    "fsdp_experts": "ranks that FSDP shards an expert over",
    "fsdp_stage": "billion parameters of one pipeline stage under FSDP",
    "optimizer": "ranks that share the optimizer",
    "gpus": "GPUs",
}


def list_sizes(plan: Plan) -> dict[str, int]:
    """The sizes of a plan that published runs are compared in."""
    layout = plan.layout
    shard_size = plan.shard_size or layout.dense_shard_size
    is_fsdp, has_experts = plan.sharding == "fsdp", plan.model.moe is not None
    return {
        "tp": layout.tensor_model_parallel_size,
        "cp": layout.context_parallel_size,
        "pp": layout.pipeline_model_parallel_size,
        "vp": layout.virtual_pipeline_model_parallel_size,
        "ep": layout.expert_model_parallel_size,
        "fsdp": shard_size if is_fsdp else 1,
        # Without expert parallelism every rank gathers all experts, of which a token uses a few.
        "fsdp_experts": layout.expert_data_parallel_size if is_fsdp and has_experts else 1,
        # All of a stage passes through every rank once per pass and micro-batch.
        "fsdp_stage": _count_billions(plan.model) // layout.pipeline_model_parallel_size if is_fsdp else 0,
        "optimizer": shard_size if plan.sharding == "distributed_optimizer" else 1,
        "gpus": layout.world_size,
    }


@lru_cache(maxsize=64)
def _count_billions(model: ModelShape) -> int:
    """Without layers for further tokens: publications differ in whether they train those."""
    return round(count_parameters(replace(model, num_mtp_layers=0)) / 1e9)


@lru_cache(maxsize=1)
def read_published_reach() -> Mapping[bool, Mapping[str, int]]:
    """The largest value of each of these sizes in published runs: of dense models (False) and of mixtures (True)."""
    plans = [run.plan for path in TABLES for run in read_runs(path)[0]]
    reach = {}
    for has_experts in (False, True):
        sizes = [list_sizes(plan) for plan in plans if (plan.model.moe is not None) == has_experts]
        reach[has_experts] = {name: max(one[name] for one in sizes) for name in sizes[0]}
    return reach


def list_cautions(
    plan: Plan, memory_bytes: int, *, memory_limit_bytes: int, memory_margin_ratio: float
) -> tuple[str, ...]:
    """Why a layout may not work as predicted, each in a few words; empty for most.

    Memory closer to the limit than the error of its estimate; groups that leave the NVLink domain; sizes beyond those
    of every published run of a dense model, or of a mixture of experts.
    """
    cautions = []
    if memory_bytes * (1 + memory_margin_ratio) > memory_limit_bytes:
        cautions.append(f"{MEMORY_CAUTION}{memory_bytes / GIB:.1f} of {memory_limit_bytes / GIB:.1f} GiB")
    if is_cpu_host(plan.cluster):
        return tuple(cautions)
    domain = plan.cluster.nvlink_domain_size
    if plan.layout.tensor_model_parallel_size > domain:
        cautions.append(f"tp {plan.layout.tensor_model_parallel_size}: beyond the NVLink domain of {domain}")
    reach = read_published_reach()[plan.model.moe is not None]
    cautions += [
        f"{size:,} {SIZE_NAMES[name]}: at most {reach[name]:,} published"
        if name in SIZE_NAMES
        else f"{name} {size:,}: at most {reach[name]:,} published"
        for name, size in list_sizes(plan).items()
        if size > reach[name]
    ]
    return tuple(cautions)
