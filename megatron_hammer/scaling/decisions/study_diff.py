"""Two projection files: which inputs differ, which layouts appeared and vanished and why, and how the best ones moved.

Why a layout is absent from a study is found by asking that study for exactly this layout: it was not asked for, was not
allowed, would not start, does not fit, or is slower than the rows that are shown.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_hammer.model.byte_units import GIB
from megatron_hammer.scaling.cost.step_time import predict_step
from megatron_hammer.scaling.evidence.layout_ranking import LAYOUT_FIELDS
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.report.projection_file import SavedRow
from megatron_hammer.scaling.report.saved_study import SavedStudy
from megatron_hammer.scaling.search.search import Search, build_search
from megatron_hammer.scaling.search.search_space import SIZE_FLAGS
from megatron_hammer.scaling.sensitivity.sensitivity import CarriedPlan, carry_plan
from megatron_hammer.scaling.sensitivity.variations import Case

# Parts of the file that are inputs. Everything else follows from them.
INPUTS = ("study", "coefficients", "cost_model")
SAME_TIME_RATIO = 1e-6  # of a prediction that is repeated with the same model


@dataclass(frozen=True, kw_only=True, slots=True)
class InputDifference:
    """One value that differs, by its path in the file. None: not in that file."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPair:
    """The same layout on as many GPUs in both studies. time_ratio: seconds per token, second over first, minus one."""

    first: SavedRow
    second: SavedRow
    time_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AbsentRow:
    """A row of one study that the other one does not show, and why. step_time_s: there; None if it cannot run."""

    row: SavedRow
    reason: str
    step_time_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeChange:
    """The best rows of one number of GPUs. None: the study has no row for it.

    time_ratio: as in RowPair, from the first best layout to the second. loss_ratio: how much slower the first best
    layout is in the second study than the best one there; None if it cannot run there, and kept_problem says why.
    """

    num_gpus: int
    first: SavedRow | None
    second: SavedRow | None
    time_ratio: float | None = None
    is_same_layout: bool = False
    loss_ratio: float | None = None
    kept_problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyDifference:
    first: SavedStudy
    second: SavedStudy
    inputs: tuple[InputDifference, ...]
    pairs: tuple[RowPair, ...]
    vanished: tuple[AbsentRow, ...]
    appeared: tuple[AbsentRow, ...]
    sizes: tuple[SizeChange, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether inputs, layouts and times are all equal."""
        times = (pair.first.step_time_s == pair.second.step_time_s for pair in self.pairs)
        return not (self.inputs or self.vanished or self.appeared) and all(times)


def compare_studies(first: SavedStudy, second: SavedStudy) -> StudyDifference:
    """The difference of two files, from the first to the second."""
    rows = [{_identify(row): row for row in one.projection.rows} for one in (first, second)]
    pairs = [
        RowPair(first=row, second=rows[1][key], time_ratio=_find_time_ratio(row, rows[1][key]))
        for key, row in rows[0].items()
        if key in rows[1]
    ]
    vanished = _explain_absent(rows[0], rows[1], second)
    appeared = _explain_absent(rows[1], rows[0], first)
    return StudyDifference(
        first=first,
        second=second,
        inputs=tuple(_list_input_differences(first.document, second.document)),
        pairs=tuple(pairs),
        vanished=vanished,
        appeared=appeared,
        sizes=_compare_sizes(first, second, pairs, vanished),
        notes=tuple(note for one in (first, second) if (note := _describe_other_model(one))),
    )


def _identify(row: SavedRow) -> Hashable:
    return (row.num_gpus, *(getattr(row.plan, name) for name in LAYOUT_FIELDS))


def _find_token_s(row: SavedRow) -> float:
    return row.step_time_s / row.plan.tokens_per_step


def _find_time_ratio(first: SavedRow, second: SavedRow) -> float:
    return _find_token_s(second) / _find_token_s(first) - 1


# --- inputs ----------------------------------------------------------------------------------------------------------


def _list_input_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[InputDifference]:
    values = [_flatten({name: one.get(name) for name in INPUTS}) for one in (first, second)]
    names = dict.fromkeys((*values[0], *values[1]))
    return [
        InputDifference(name=name, first=values[0].get(name), second=values[1].get(name))
        for name in names
        if values[0].get(name) != values[1].get(name)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Tables by the path of each value: study.gpu.power_w. Lists stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    inner = ((f"{prefix}.{name}".removeprefix("."), item) for name, item in value.items())
    return {path: leaf for name, item in inner for path, leaf in _flatten(item, name).items()}


# --- rows ------------------------------------------------------------------------------------------------------------


def _explain_absent(
    rows: Mapping[Hashable, SavedRow], others: Mapping[Hashable, SavedRow], other: SavedStudy
) -> tuple[AbsentRow, ...]:
    """The rows that are not among the others, each with the reason why the other study does not show it."""
    search = _build_search(other)
    return tuple(_explain(row, other, search) for key, row in rows.items() if key not in others)


def _build_search(saved: SavedStudy) -> Search | None:
    """None if the file does not have the coefficients."""
    coefficients = saved.projection.coefficients
    return None if coefficients is None else build_search(coefficients)


def _explain(row: SavedRow, other: SavedStudy, search: Search | None) -> AbsentRow:
    study, plan = other.study, row.plan
    if row.num_gpus not in study.gpu_counts:
        return AbsentRow(row=row, reason=f"the study has no size of {row.num_gpus:,} GPUs", step_time_s=None)
    forbidden = _list_forbidden(plan, other)
    if forbidden:
        return AbsentRow(row=row, reason=f"not allowed: {', '.join(forbidden)}", step_time_s=None)
    if search is None or other.projection.coefficients is None:
        reason = "unknown: the file does not have the coefficients; write it again with this version"
        return AbsentRow(row=row, reason=reason, step_time_s=None)
    case = Case(study=replace(study, gpu_counts=(row.num_gpus,)), coefficients=other.projection.coefficients)
    carried = carry_plan(plan, case, search)
    step_time_s = None if carried.projection is None else carried.projection.step.total_s
    return AbsentRow(row=row, reason=_describe_reason(carried, row, other), step_time_s=step_time_s)


def _list_forbidden(plan: Plan, other: SavedStudy) -> list[str]:
    """The restrictions of the other study that exclude the plan, as flags."""
    layout, space = plan.layout, other.study.space
    sizes = {
        "tensor_model_parallel_sizes": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_sizes": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_sizes": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_sizes": layout.context_parallel_size,
        "expert_model_parallel_sizes": layout.expert_model_parallel_size,
        "expert_tensor_parallel_sizes": layout.expert_tp,
        "micro_batch_sizes": plan.micro_batch_size,
    }
    forbidden = [
        f"--{SIZE_FLAGS[name]} {','.join(map(str, allowed))}"
        for name, size in sizes.items()
        if (allowed := getattr(space, name)) is not None and size not in allowed
    ]
    if plan.recompute not in space.recomputes:
        forbidden.append(f"--recompute {','.join(space.recomputes)}")
    if plan.sharding not in space.shardings:
        forbidden.append(f"--sharding {','.join(space.shardings)}")
    return forbidden


def _describe_reason(carried: CarriedPlan, row: SavedRow, other: SavedStudy) -> str:
    study = other.study
    if carried.projection is None:
        if carried.least_memory_bytes is not None:
            need, limit = carried.least_memory_bytes / GIB, study.memory_limit_bytes / GIB
            return f"does not fit: {need:.1f} GiB of {limit:.1f}"
        batch = study.global_batch_size_at(row.num_gpus)
        return f"would not start with {batch:,} samples of {study.seq_length:,} tokens and {study.model.name}"
    seconds = carried.projection.step.total_s
    shown = [one.step_time_s for one in other.projection.rows if one.num_gpus == row.num_gpus]
    if not shown:
        return f"the file shows no row for this size; it would take {seconds:.4g} s"
    if seconds > max(shown):
        return f"slower than the {len(shown)} rows shown: {seconds:.4g} s, and these up to {max(shown):.4g} s"
    return f"another layout of its family, or one that is tied with it, is shown: it takes {seconds:.4g} s"


def _describe_other_model(saved: SavedStudy) -> str | None:
    """A note if this version of the cost model does not repeat the file's own prediction."""
    coefficients = saved.projection.coefficients
    if coefficients is None or not saved.projection.rows:
        return None
    row = saved.projection.rows[0]
    seconds = predict_step(row.plan, coefficients).total_s
    if math.isclose(seconds, row.step_time_s, rel_tol=SAME_TIME_RATIO):
        return None
    return (
        f"{saved.path}: another version of the cost model wrote this file (row {row.row_id}: {row.step_time_s:.4g} s, "
        f"this version predicts {seconds:.4g} s). The times in the reasons are those of this version."
    )


# --- sizes -----------------------------------------------------------------------------------------------------------


def _compare_sizes(
    first: SavedStudy, second: SavedStudy, pairs: Sequence[RowPair], vanished: Sequence[AbsentRow]
) -> tuple[SizeChange, ...]:
    bests = [{row.num_gpus: row for row in one.projection.rows if row.rank == 1} for one in (first, second)]
    sizes = []
    for num_gpus in sorted({*first.study.gpu_counts, *second.study.gpu_counts}):
        before, after = bests[0].get(num_gpus), bests[1].get(num_gpus)
        if before is None or after is None:
            sizes.append(SizeChange(num_gpus=num_gpus, first=before, second=after))
            continue
        # The first study's best layout in the second study: a row of it, or predicted for the reason of its absence.
        kept_s = next((pair.second.step_time_s for pair in pairs if pair.first is before), None)
        absent = next((one for one in vanished if one.row is before), None)
        if absent is not None:
            kept_s = absent.step_time_s
        sizes.append(
            SizeChange(
                num_gpus=num_gpus,
                first=before,
                second=after,
                time_ratio=_find_time_ratio(before, after),
                is_same_layout=_identify(before) == _identify(after),
                loss_ratio=None if kept_s is None else kept_s / after.step_time_s - 1,
                kept_problem=absent.reason if absent is not None and kept_s is None else None,
            )
        )
    return tuple(sizes)
