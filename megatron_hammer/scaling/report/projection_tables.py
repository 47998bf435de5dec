"""A projection as a list of tables, which the terminal and the HTML report both show.

`projection_file.py` writes the same content, and more, for programs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.plan import Plan, StepTime
from megatron_hammer.scaling.report import reference_rows
from megatron_hammer.scaling.report.dispatcher_note import describe_faster_dispatcher
from megatron_hammer.scaling.search.projection import (
    COMPUTE_PARTS,
    MEMORY_NAMES,
    PART_NAMES,
    Projection,
    SizeProjection,
    Study,
    StudyResult,
    describe_cuts,
    estimate_bill,
    estimate_mfu_ratio,
    scaling_efficiency_ratio,
)

# Columns of the breakdown, each the sum of some parts of a step.
SHARES = {
    "compute": COMPUTE_PARTS,
    "recomp.": ("recompute_s",),
    "TP": ("tensor_parallel_s",),
    "CP": ("context_parallel_s",),
    "EP": ("expert_parallel_s",),
    "PP sends": ("pipeline_p2p_s",),
    "bubble": ("bubble_s",),
    "DP": ("data_parallel_s",),
    "optim.": ("optimizer_s",),
    "overhead": ("overhead_s",),
    "jitter": ("jitter_s",),
}
MEMORY_HEADS = dict(
    zip(
        MEMORY_NAMES,
        ("weights", "grads", "optim.", "buffers", "activ.", "logits", "passing", "CUDA", "frag."),
        strict=True,
    )
)
SHARDING_NAMES = {"none": "none", "distributed_optimizer": "optimizer", "fsdp": "FSDP"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTable:
    """Words for a table: the first `num_text` columns are text, the others numbers; a line parts the groups."""

    title: str
    columns: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    num_text: int = 0
    note: str = ""


def build_tables(result: StudyResult) -> list[ResultTable]:
    """Every table of the result that has rows."""
    tables = [_build_speed_table(result), _build_layout_table(result), _build_reference_table(result)]
    tables += [_build_share_table(result), _build_memory_table(result)]
    if result.study.train_tokens is not None:
        tables.append(_build_bill_table(result))
    if result.companion is not None:
        tables.append(_build_companion_table(result.companion))
    if result.overlay is not None:
        tables += [_build_overlay_table(result), _build_left_out_table(result)]
    return [table for table in tables if any(table.groups)]


def print_tables(result: StudyResult, stream: IO[str]) -> None:
    """Print the whole result except its last line (describe_result)."""
    print(describe_study(result), file=stream)
    for table in build_tables(result):
        print(file=stream)
        print_table(table, stream)
    print(file=stream)
    for sentence in (*list_problems(result), describe_knee(result)):
        print(sentence, file=stream)


def print_table(data: ResultTable, stream: IO[str]) -> None:
    """Print a table and its note."""
    from megatron_hammer.files.tables import build_table, open_console

    console = open_console(stream)
    table = build_table(data.title, data.columns, (), num_text=data.num_text)
    for group in data.groups:
        for row in group:
            table.add_row(*row)
        table.add_section()
    console.print(table)
    if data.note:
        console.print(data.note, markup=False)


def list_problems(result: StudyResult) -> list[str]:
    return [size.problem for size in result.sizes if size.problem is not None]


def describe_batch(result: StudyResult) -> str:
    study = result.study
    if study.samples_per_gpu is not None:
        return f"weak scaling, {float(study.samples_per_gpu):g} samples per GPU"
    return f"strong scaling, {study.global_batch_size:,} samples per step"


def describe_study(result: StudyResult) -> str:
    study = result.study
    return (
        f"{study.model.name} on {study.machine}: {describe_batch(result)}, sequence "
        f"{study.seq_length:,}, {study.precision}{describe_expert_options(study)}, "
        f"at most {study.memory_limit_bytes / GIB:.1f} GiB per GPU"
    )


def describe_expert_options(study: Study) -> str:
    """What is assumed of experts; empty for a dense model."""
    if study.model.moe is None:
        return ""
    names, ratio = " or ".join(study.dispatchers), study.experts.imbalance_ratio
    return f", experts by {names} with {ratio:g} times the mean load on the busiest rank"


def describe_knee(result: StudyResult) -> str:
    """The knee in a sentence."""
    knee = result.knee
    if knee is None:
        return "Knee: none, as nothing fits at any size."
    share = f"{knee.threshold_ratio:.0%} of the best speed per GPU at a smaller size"
    if knee.num_gpus_beyond is None:
        return f"Knee: not reached at {knee.num_gpus:,} GPUs; every size keeps {share}."
    return f"Knee: {knee.num_gpus:,} GPUs; {knee.num_gpus_beyond:,} do not keep {share}."


def describe_result(result: StudyResult) -> str:
    """The last line: counts in and out."""
    feasible = sum(size.best is not None for size in result.sizes)
    candidates = sum(size.num_candidates for size in result.sizes)
    rows = sum(len(size.projections) for size in result.sizes)
    return f"{len(result.sizes)} sizes, {feasible} feasible; {candidates:,} candidates, {rows} layouts shown"


def format_tokens(tokens: int) -> str:
    """15000000000000 -> 15T. All digits are written if a suffix would hide some."""
    for size, letter in ((10**12, "T"), (10**9, "B")):
        if tokens >= size and tokens * 100 % size == 0:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:,}"


def format_amount(amount: float) -> str:
    """A quantity with at least three digits and without a power of ten: 0.0123, 4.57, 38.2, 1,234."""
    if amount >= 1000 or amount == 0:
        return f"{amount:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(amount)))
    return f"{amount:.{digits}f}"


def share_of(step: StepTime, parts: Sequence[str]) -> float:
    return sum(getattr(step, name) for name in parts) / step.total_s


def describe_stages(projection: Projection) -> str:
    """The pipeline size, and why its stages are uneven: 4+EL if embedding and loss each take the place of a layer."""
    layout = projection.plan.layout
    size = str(layout.pipeline_model_parallel_size)
    if layout.num_layers_first_stage is not None:
        return f"{size} ({layout.num_layers_first_stage}..{layout.num_layers_last_stage})"
    extra = ("E" if layout.accounts_for_embedding else "") + ("L" if layout.accounts_for_loss else "")
    return f"{size}+{extra}" if extra else size


def describe_experts(projection: Projection) -> str:
    """The expert-parallel size, and the tensor-parallel size of an expert if it differs from tp: 8 etp1."""
    layout = projection.plan.layout
    is_own = projection.plan.model.moe is not None and layout.expert_tp != layout.tensor_model_parallel_size
    return (
        f"{layout.expert_model_parallel_size} etp{layout.expert_tp}"
        if is_own
        else str(layout.expert_model_parallel_size)
    )


def describe_overlap(plan: Plan) -> str:
    """The kinds of communication that run beside other work: DP TP EP."""
    kinds = {
        "DP": plan.overlaps_grad_reduce,
        "TP": plan.overlaps_tensor_parallel,
        "EP": plan.experts.overlaps_communication,
    }
    return " ".join(name for name, is_overlapped in kinds.items() if is_overlapped)


def _best(result: StudyResult) -> list[tuple[SizeProjection, Projection]]:
    return [(size, size.best) for size in result.sizes if size.best is not None]


def _build_speed_table(result: StudyResult) -> ResultTable:
    letter = result.study.mfu_convention
    rows = []
    for size, best in _best(result):
        ratio = scaling_efficiency_ratio(result.sizes, size)
        bottleneck = f"{share_of(best.step, (best.bottleneck,)):.1%} {PART_NAMES[best.bottleneck]}"
        rows.append(
            (
                f"{size.num_gpus:,}",
                f"{best.step.total_s:.3f}",
                f"{best.step.low_s:.3f} - {best.step.high_s:.3f}",
                f"{best.tokens_per_s_per_gpu * size.num_gpus:,.0f}",
                f"{best.tokens_per_s_per_gpu:,.0f}",
                f"{estimate_mfu_ratio(best, letter):.1%}",
                "" if ratio is None else f"{ratio:.1%}",
                bottleneck,
            )
        )
    columns = ("GPUs", "s per step", "80 % band", "tokens/s", "tokens/s/GPU", f"MFU {letter}", "scaling", "bottleneck")
    note = (
        "scaling: tokens/s/GPU relative to the smallest size that fits; bottleneck: the largest part that is no "
        "compute, with its share of the step."
    )
    return ResultTable(
        title="The layout to start from at each size",
        columns=columns,
        groups=(tuple(rows),),
        note=" ".join(filter(None, (note, describe_faster_dispatcher(result)))),
    )


def _build_layout_table(result: StudyResult) -> ResultTable:
    """The layout to start from at each size, then the others in the order of their times."""
    columns = ("row", "tp", "cp", "pp", "vp", "ep", "dp", "micro", "batch", "recompute", "sharded", "overlap")
    figures = ("s per step", f"MFU {result.study.mfu_convention}", "GiB", "best", "tie", "copies", "caution")
    has_choice = len(result.study.dispatchers) > 1
    groups = []
    for size in result.sizes:
        rows = []
        for rank, projection in enumerate(size.projections, start=1):
            plan, layout = projection.plan, projection.plan.layout
            rows.append(
                (
                    f"{size.num_gpus}-{rank}",
                    str(layout.tensor_model_parallel_size),
                    str(layout.context_parallel_size),
                    describe_stages(projection),
                    str(layout.virtual_pipeline_model_parallel_size),
                    describe_experts(projection) + (f" {plan.experts.dispatcher}" if has_choice else ""),
                    str(layout.data_parallel_size),
                    str(plan.micro_batch_size),
                    f"{plan.global_batch_size:,}",
                    " ".join(plan.recompute_modules) if plan.recompute == "selective" else plan.recompute,
                    SHARDING_NAMES[plan.sharding] + (f"/{plan.shard_size}" if plan.shard_size else ""),
                    describe_overlap(plan),
                    f"{projection.step.total_s:.3f}",
                    f"{estimate_mfu_ratio(projection, result.study.mfu_convention):.1%}",
                    f"{projection.memory.total_bytes / GIB:.1f}",
                    f"{projection.standing.chance_of_best:.0%}",
                    "tie" if projection.standing.is_tied else "",
                    str(projection.standing.num_near_copies),
                    "; ".join(projection.standing.cautions),
                )
            )
        groups.append(tuple(rows))
    return ResultTable(
        title="Layouts, the one to start from first, then the fastest",
        columns=(*columns, *figures),
        groups=tuple(groups),
        num_text=1,
        note="row: what scaling_study.py emit takes. TP is with sequence parallelism. pp 4+EL: embedding and loss take "
        "the place of a layer each. best: the chance that it, or one of its near copies, is the fastest in reality. "
        "tie: its difference to the fastest is smaller than the error. copies: plans that differ in micro-batch, "
        "chunks, recomputation, context ranks or the group that shards. Of ties, the first row has the fewest "
        "cautions and mechanisms.",
    )


def _build_reference_table(result: StudyResult) -> ResultTable:
    return ResultTable(
        title="NVIDIA's published runs of this model, s per step",
        columns=reference_rows.COLUMNS,
        groups=(reference_rows.list_reference_cells(result),),
        num_text=3,
        note=reference_rows.NOTE,
    )


def _build_share_table(result: StudyResult) -> ResultTable:
    """Where the time of the layout to start from goes. Parts that are zero at every size are left out."""
    best = _best(result)
    shares = {
        name: parts
        for name, parts in SHARES.items()
        if name == "compute" or any(share_of(one.step, parts) > 0 for _, one in best)
    }
    rows = (
        (f"{size.num_gpus:,}", *(f"{share_of(one.step, parts):.1%}" for parts in shares.values())) for size, one in best
    )
    return ResultTable(title="Where its time goes", columns=("GPUs", *shares), groups=(tuple(rows),))


def _build_memory_table(result: StudyResult) -> ResultTable:
    has_host = any(one.memory.host_bytes for _, one in _best(result))
    rows = (
        (
            f"{size.num_gpus:,}",
            str(one.memory.pp_rank),
            *(f"{getattr(one.memory, name) / GIB:.1f}" for name in MEMORY_HEADS),
            f"{one.memory.total_bytes / GIB:.1f}",
            *((f"{one.memory.host_bytes / GIB:.1f}",) if has_host else ()),
        )
        for size, one in _best(result)
    )
    return ResultTable(
        title="Memory of its heaviest stage, GiB per GPU",
        columns=("GPUs", "stage", *MEMORY_HEADS.values(), "total", *(("on host",) if has_host else ())),
        groups=(tuple(rows),),
        note="passing: gradients and gathered tensors at the peak. CUDA (context, NCCL) and frag. are allowances.",
    )


def _build_bill_table(result: StudyResult) -> ResultTable:
    study = result.study
    assert study.train_tokens is not None
    rows = []
    for size, best in _best(result):
        bill = estimate_bill(best, train_tokens=study.train_tokens, usd_per_gpu_hour=study.usd_per_gpu_hour)
        rows.append(
            (
                f"{size.num_gpus:,}",
                f"{bill.num_steps:,}",
                format_amount(bill.days),
                f"{format_amount(bill.low_days)} - {format_amount(bill.high_days)}",
                format_amount(bill.gpu_hours),
                format_amount(bill.energy_mwh),
                *(() if bill.cost_usd is None else (format_amount(bill.cost_usd),)),
            )
        )
    price = study.usd_per_gpu_hour
    return ResultTable(
        title=f"Training on {format_tokens(study.train_tokens)} tokens",
        columns=("GPUs", "steps", "days", "80 % band", "GPU-hours", "MWh", *(() if price is None else ("USD",))),
        groups=(tuple(rows),),
        note="No price is known: pass --usd-per-gpu-hour." if price is None else f"At {price:g} USD per GPU-hour.",
    )


def _build_companion_table(companion: StudyResult) -> ResultTable:
    """The curve of the other way of scaling."""
    letter = companion.study.mfu_convention
    rows = []
    for size, best in _best(companion):
        ratio = scaling_efficiency_ratio(companion.sizes, size)
        rows.append(
            (
                f"{size.num_gpus:,}",
                f"{size.global_batch_size:,}",
                f"{best.step.total_s:.3f}",
                f"{best.tokens_per_s_per_gpu:,.0f}",
                f"{estimate_mfu_ratio(best, letter):.1%}",
                "" if ratio is None else f"{ratio:.1%}",
                str(best.plan.micro_batch_size),
                describe_cuts(best.plan),
            )
        )
    return ResultTable(
        title=f"For comparison: {describe_batch(companion)}",
        columns=("GPUs", "batch", "s per step", "tokens/s/GPU", f"MFU {letter}", "scaling", "micro", "layout"),
        groups=(tuple(rows),),
        note=describe_knee(companion),
    )


def _build_overlay_table(result: StudyResult) -> ResultTable:
    assert result.overlay is not None
    rows = []
    for one in result.overlay.runs:
        run, plan = one.run, one.run.plan
        is_as_long = plan.seq_length == result.study.seq_length
        rows.append(
            (
                f"{run.row_number} {run.source}",
                f"{plan.layout.world_size:,}",
                describe_cuts(plan),
                f"{plan.global_batch_size:,}",
                plan.precision if is_as_long else f"{plan.precision} s={plan.seq_length}",
                f"{run.step_time_s:.3f}",
                f"{one.step.total_s:.3f}",
                f"{one.error_ratio:+.1%}{'' if one.is_counted else '*'}",
                "in" if one.is_in_band else "out",
            )
        )
    return ResultTable(
        title="Measured runs, each predicted with its own layout, s per step",
        columns=("line, source", "GPUs", "layout", "batch", "numbers", "measured", "predicted", "error", "band"),
        groups=(tuple(rows),),
        num_text=1,
        note="error: above zero where the prediction is too slow; * the coefficients were fitted on this very run, so "
        "that its error says nothing of new ones.",
    )


def _build_left_out_table(result: StudyResult) -> ResultTable:
    assert result.overlay is not None
    rows = tuple((str(row.row_number), row.source, row.reason) for row in result.overlay.left_out)
    return ResultTable(title="Measured rows left out", columns=("line", "source", "why"), groups=(rows,), num_text=3)
