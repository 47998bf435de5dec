"""Published runs of the study's model beside its projection: cells of a table, and values for JSON and CSV."""

from dataclasses import asdict
from typing import Any

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.search.projection import Projection, Reference, StudyResult, describe_plan

COLUMNS = (
    "at GPUs", "line, source", "published layout", "its GPUs", "batch", "numbers", "measured", "predicted", "error",
    "here", "GiB here", "against row 1",
)  # fmt: skip
NOTE = (
    "The published run of this model that is closest to the GPU and to each size. here: its layout and dispatcher with "
    "all else as in the study; empty where the GPUs, the batch or the sequence do not divide."
)


def list_reference_cells(result: StudyResult) -> tuple[tuple[str, ...], ...]:
    """By COLUMNS, one row for each size: the closest published run, and its layout at this size."""
    best = {size.num_gpus: size.best for size in result.sizes}
    return tuple(_list_cells(one, best.get(one.num_gpus)) for one in result.references)


def _list_cells(one: Reference, best: Projection | None) -> tuple[str, ...]:
    plan, own = one.run.plan, one.projection
    here = ("", "", "")
    if own is not None:
        against = "" if best is None else f"{own.step.total_s / best.step.total_s - 1:+.1%}"
        here = (f"{own.step.total_s:.3f}", f"{own.memory.total_bytes / GIB:.1f}", against)
    return (
        f"{one.num_gpus:,}",
        f"{one.run.row_number} {one.run.source}",
        describe_plan(plan),
        f"{plan.layout.world_size:,} {plan.gpu.name}",
        f"{plan.global_batch_size:,}",
        f"{plan.precision} s={plan.seq_length}",
        f"{one.run.step_time_s:.3f}",
        f"{one.step.total_s:.3f}",
        f"{one.error_ratio:+.1%}",
        *here,
    )


def list_references(result: StudyResult) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [_describe(one) for one in result.references]


def list_reference_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Rows of the CSV, in the names of its columns where there are some, at the size of the published run."""
    rows = []
    for one in result.references:
        plan = one.run.plan
        rows.append(
            {
                "id": f"{one.num_gpus}-published",
                "gpus": plan.layout.world_size,
                **asdict(plan.layout),
                "seq_length": plan.seq_length,
                "micro_batch_size": plan.micro_batch_size,
                "global_batch_size": plan.global_batch_size,
                "precision": plan.precision,
                "recompute": plan.recompute,
                "sharding": plan.sharding,
                "step_time_s": one.step.total_s,
                "low_s": one.step.low_s,
                "high_s": one.step.high_s,
                "source": one.run.source,
                "measured_step_time_s": one.run.step_time_s,
            }
        )
    return rows


def _describe(one: Reference) -> dict[str, Any]:
    plan, own = one.run.plan, one.projection
    return {
        "at_gpus": one.num_gpus,
        "row_number": one.run.row_number,
        "source": one.run.source,
        "gpus": plan.layout.world_size,
        "gpu": plan.gpu.name,
        "layout": asdict(plan.layout),
        "description": describe_plan(plan),
        "seq_length": plan.seq_length,
        "micro_batch_size": plan.micro_batch_size,
        "global_batch_size": plan.global_batch_size,
        "precision": plan.precision,
        "measured_s": one.run.step_time_s,
        "predicted_s": one.step.total_s,
        "low_s": one.step.low_s,
        "high_s": one.step.high_s,
        "error_ratio": one.error_ratio,
        "here": None if own is None else _describe_here(own),
    }


def _describe_here(own: Projection) -> dict[str, Any]:
    return {
        "description": describe_plan(own.plan),
        "step_time_s": own.step.total_s,
        "memory_bytes": own.memory.total_bytes,
    }
