"""NVIDIA's published runs of a study's model: what is known to work, beside what the search found.

A reference is shown with its measured time and with the time that the same cost model predicts for it. The same layout
with another number of replicas, at the study's own size and batch, is the fair comparison with the search's best: with
the same software, loads of experts and formats of parameters, so that only the layouts differ, and the dispatcher.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import StageMemory, find_grid_problems
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import select_generation
from megatron_hammer.scaling.plan import TODAY, Plan, StepTime
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, read_runs
from megatron_hammer.scaling.published.run_table import PUBLISHED_MOE_PATH, PUBLISHED_RUNS_PATH
from megatron_hammer.scaling.search.projection import Projection, Reference, Study
from megatron_hammer.scaling.search.search_space import has_quantized_parameters, is_cpu_host, list_micro_batch_sizes

# Publications of NVIDIA's own runs of Megatron, as the tables name them.
NVIDIA_SOURCES = ("MegatronBridge", "MegatronLM_README_H100", "NVIDIA_dgxc", "dgxc_", "NeMo", "MCoreMoE")
# What two shapes must agree in to be one model; names, sources and limits of positions differ between configurations.
SHAPE_FIELDS = ("num_layers", "hidden_size", "num_attention_heads", "head_dim")
EXPERT_FIELDS = ("num_experts", "router_topk", "ffn_hidden_size")


def find_references(
    study: Study,
    predict: Callable[[Plan], StepTime],
    estimate: Callable[[Plan], StageMemory],
    runs: Sequence[MeasuredRun] | None = None,
) -> tuple[Reference, ...]:
    """For each size of a study, the published run of its model that is closest; none if there is none.

    Closest: the same GPU, or its generation, the same precision, then the number of GPUs (as a ratio), the sequence
    length, and the newest source. A run that is the closest one at several sizes is listed at each, because its layout
    is projected to each.
    """
    if is_cpu_host(study.cluster):
        return ()
    runs = [run for run in (list_published_runs() if runs is None else runs) if _is_reference(run, study)]
    if not runs:
        return ()
    references = []
    for num_gpus in study.gpu_counts:
        run = min(runs, key=lambda run: _measure_remoteness(run, study, num_gpus))
        references.append(
            Reference(
                num_gpus=num_gpus,
                run=run,
                step=predict(run.plan),
                projection=_project(run.plan, study, num_gpus, predict, estimate),
            )
        )
    return tuple(references)


@lru_cache(maxsize=1)
def list_published_runs() -> tuple[MeasuredRun, ...]:
    """The runs of both published tables that can be predicted."""
    return tuple(run for path in (PUBLISHED_RUNS_PATH, PUBLISHED_MOE_PATH) for run in read_runs(path)[0])


def _is_reference(run: MeasuredRun, study: Study) -> bool:
    return (
        run.is_megatron_style
        and run.source.startswith(NVIDIA_SOURCES)
        and _identify_shape(run.plan.model) == _identify_shape(study.model)
    )


def _identify_shape(model: ModelShape) -> tuple[Any, ...]:
    moe = model.moe
    attention = tuple(getattr(model, name) for name in SHAPE_FIELDS)
    if moe is None:
        return (*attention, model.ffn_hidden_size)
    # If all layers have experts, nothing has the width of a dense layer.
    return (*attention, *(getattr(moe, name) for name in EXPERT_FIELDS))


def _measure_remoteness(run: MeasuredRun, study: Study, num_gpus: int) -> tuple[Any, ...]:
    plan = run.plan
    return (
        plan.gpu.name != study.gpu.name,
        select_generation(plan.gpu) != select_generation(study.gpu),
        plan.precision != study.precision,
        abs(math.log(plan.layout.world_size / num_gpus)),
        abs(math.log(plan.seq_length / study.seq_length)),
        [-ord(letter) for letter in run.source],  # the newest version has the largest name
        run.row_number,
    )


def _project(
    plan: Plan,
    study: Study,
    num_gpus: int,
    predict: Callable[[Plan], StepTime],
    estimate: Callable[[Plan], StageMemory],
) -> Projection | None:
    """The run's layout with as many replicas as the size has room for; None if the study's batch does not divide."""
    per_replica = plan.layout.world_size // plan.layout.data_parallel_size
    batch = study.global_batch_size_at(num_gpus)
    dp, rest = divmod(num_gpus, per_replica)
    if rest or batch % dp or study.seq_length % (2 * plan.layout.context_parallel_size):
        return None
    layout = replace(plan.layout, data_parallel_size=dp)
    sizes = list_micro_batch_sizes(layout, batch, study.space)
    fitting = [size for size in sizes if size <= plan.micro_batch_size]
    shard_size = plan.shard_size if (plan.shard_size or 0) < layout.dense_shard_size else None
    if find_grid_problems(layout) or not fitting or layout.dense_shard_size % (shard_size or 1):
        return None
    own = replace(
        plan,
        model=study.model,
        gpu=study.gpu,
        cluster=study.cluster,
        layout=layout,
        shard_size=shard_size,
        seq_length=study.seq_length,
        micro_batch_size=max(fitting),
        global_batch_size=batch,
        precision=study.precision,
        has_quantized_parameters=has_quantized_parameters(study.precision, plan.sharding, study.space),
        keeps_quantized_copies=True,
        gradient_bytes=study.gradient_bytes,
        vocab_divisible_by=study.vocab_divisible_by,
        experts=replace(plan.experts, imbalance_ratio=study.experts.imbalance_ratio, pads_to_capacity=False),
        cuda_graphs="none",
        software_year=TODAY,
    )
    try:
        return Projection(plan=own, step=predict(own), memory=estimate(own))
    except ConfigError:
        return None
