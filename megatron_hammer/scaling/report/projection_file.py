"""A projection as JSON, which `emit` reads back, and as CSV with one row per layout.

The JSON holds whole plans: model, GPU and cluster once, the rest of each plan in its row. The same study gives the same
bytes: the file contains neither the time of day nor the machine that ran the study.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer import __version__
from megatron_hammer.errors import ConfigError
from megatron_hammer.files import csv_table
from megatron_hammer.files.typed import read_json, validate
from megatron_hammer.model.accounting import FLOP_CONVENTIONS, StageMemory, count_active_parameters, count_parameters
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.cost.coefficients import Coefficients, list_tables, read_tables
from megatron_hammer.scaling.plan import PARTS, Cluster, Gpu, NonNegativeFloat, Plan, PositiveFloat, PositiveInt
from megatron_hammer.scaling.report.reference_rows import list_reference_rows, list_references
from megatron_hammer.scaling.search.projection import (
    Overlay,
    Projection,
    SizeProjection,
    Study,
    StudyResult,
    estimate_bill,
    estimate_mfu_ratio,
    scaling_efficiency_ratio,
)

FORMAT = "megatron_hammer.scaling.projection"
FORMAT_VERSION = 1
REMEDY_OF_A_FIELD = "Write it again with this version's scaling_study.py project."
COUNTS_OF_A_MODEL = ("num_parameters", "num_active_parameters")  # written, and counted again by readers
MAX_LISTED = 20  # entries of a list in the coefficients' provenance
# The fields of a plan that a row holds besides the layout. Model, GPU and cluster are those of the study.
PLAN_FIELDS = tuple(field.name for field in fields(Plan) if field.name not in ("model", "layout", "gpu", "cluster"))
MEMORY_FIELDS = tuple(field.name for field in fields(StageMemory) if field.name.endswith("_bytes"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRow:
    """One layout of a projection that was read back."""

    row_id: str
    num_gpus: int
    rank: int
    plan: Plan
    step_time_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedProjection:
    """What other commands need of a projection. coefficients: of the cost model; None if the file has none."""

    path: Path
    train_tokens: int | None
    rows: tuple[SavedRow, ...]
    coefficients: Coefficients | None = None
    usd_per_gpu_hour: float | None = None

    def select_row(self, row_id: str) -> SavedRow:
        """The row with this id. Raises ConfigError with the known ids."""
        for row in self.rows:
            if row.row_id == row_id:
                return row
        self._require(self.rows)
        raise ConfigError(
            f"{self.path}: must hold the row that is asked for, got row={row_id!r}. "
            f"Use one of: {', '.join(row.row_id for row in self.rows)}."
        )

    def select_rows(self, ids: str | None) -> list[SavedRow]:
        """The rows with these ids, or the first of each size. Raises ConfigError for an unknown id or without rows."""
        if ids is not None:
            # A repeated id would be counted as two rows of one file.
            chosen = [self.select_row(row_id) for row_id in dict.fromkeys(ids.split(",")) if row_id]
            if not chosen:
                raise ConfigError(
                    f"rows: must name a row, got {ids!r}. Pass ids such as 512-1,64-1, or leave --rows out."
                )
            return chosen
        # Rows are ranked within each number of GPUs, so there is one for each size.
        first = [row for row in self.rows if row.rank == 1]
        self._require(first)
        return first

    def _require(self, rows: Sequence[SavedRow]) -> None:
        if not rows:
            raise ConfigError(f"{self.path}: must hold a row, got none. Project sizes on which the model fits.")


def build_row(projection: Projection, *, rank: int) -> SavedRow:
    """What a projection's row is read back as."""
    step = projection.step
    return SavedRow(
        row_id=f"{projection.num_gpus}-{rank}",
        num_gpus=projection.num_gpus,
        rank=rank,
        plan=projection.plan,
        step_time_s=step.total_s,
        low_s=step.low_s,
        high_s=step.high_s,
    )


def build_projection_document(result: StudyResult) -> dict[str, Any]:
    """The projection as plain values for JSON."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "study": _build_study(result.study),
        "coefficients": _summarise(result.provenance),
        "cost_model": None if result.coefficients is None else _build_cost_model(result.coefficients),
        "sizes": [_build_size(result, size) for size in result.sizes],
        "knee": None if result.knee is None else asdict(result.knee),
        "rows": list_rows(result),
        "references": list_references(result),
        "companion": None if result.companion is None else _build_companion(result.companion),
        "overlay": None if result.overlay is None else _build_overlay(result.overlay),
    }


def format_json(document: Mapping[str, Any]) -> str:
    # NaN is no JSON. Python would write it, and other readers would refuse the file.
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def list_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Every projected layout of every size: the one to start from, then the others in the order of their times."""
    return [
        _build_row(result.study, size, rank, projection)
        for size in result.sizes
        for rank, projection in enumerate(size.projections, start=1)
    ]


def format_csv(result: StudyResult) -> str:
    """One line per layout, then the published runs. Nested values become columns named by their path, with dots."""
    rows = [*(_flatten(row) for row in list_rows(result)), *list_reference_rows(result)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_table.format_csv(names, [[row.get(name) for name in names] for row in rows])


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            inner = "" if name in ("plan", "layout", "prediction") else f"{name}."
            flat |= _flatten(value, prefix + inner)
        else:
            flat[prefix + name] = "; ".join(value) if name == "cautions" else value
    return flat


def _build_study(study: Study) -> dict[str, Any]:
    return {
        "model": _describe_model(study.model),
        "preset": study.preset,
        "hf_config": study.hf_config,
        "gpu": asdict(study.gpu),
        "cluster": asdict(study.cluster),
        "gpu_counts": list(study.gpu_counts),
        "seq_length": study.seq_length,
        "precision": study.precision,
        "batch": {
            "global_batch_size": study.global_batch_size,
            "samples_per_gpu": None if study.samples_per_gpu is None else float(study.samples_per_gpu),
        },
        "experts": None if study.model.moe is None else asdict(study.experts),
        "train_tokens": study.train_tokens,
        "memory_limit_bytes": study.memory_limit_bytes,
        "memory_margin_ratio": study.memory_margin_ratio,
        "mfu_convention": study.mfu_convention,
        "mfu_convention_meaning": FLOP_CONVENTIONS[study.mfu_convention],
        "usd_per_gpu_hour": study.usd_per_gpu_hour,
        "gradient_bytes": study.gradient_bytes,
        "restrictions": {name: value for name, value in asdict(study.space).items() if value is not None},
    }


def _build_size(result: StudyResult, size: SizeProjection) -> dict[str, Any]:
    best = size.best
    return {
        "gpus": size.num_gpus,
        "global_batch_size": size.global_batch_size,
        "num_candidates": size.num_candidates,
        "is_feasible": best is not None,
        "problem": size.problem,
        "least_memory_bytes": size.least_memory_bytes,
        "best_row": f"{size.num_gpus}-1" if best else None,
        "scaling_efficiency_ratio": scaling_efficiency_ratio(result.sizes, size),
        "bottleneck": best.bottleneck if best else None,
    }


def _summarise(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The coefficients' provenance. Long lists, such as the fingerprints of runs, are replaced by their length."""
    return {
        name: _summarise(value)
        if isinstance(value, Mapping)
        else {"num_entries": len(value)}
        if isinstance(value, list | tuple) and len(value) > MAX_LISTED
        else value
        for name, value in provenance.items()
    }


def _build_cost_model(coefficients: Coefficients) -> dict[str, Any]:
    """What predicted the steps: `trace` and `diff` predict them again."""
    return {"version": __version__, "coefficients": list_tables(coefficients)}


def _build_companion(companion: StudyResult) -> dict[str, Any]:
    """The curve of the other way of scaling: one layout of each size. They are not rows that `emit` can use."""
    document = build_projection_document(companion)
    rows = [{**row, "id": None} for row in document["rows"]]
    sizes = [{**size, "best_row": None} for size in document["sizes"]]
    return {"batch": document["study"]["batch"], "sizes": sizes, "rows": rows, "knee": document["knee"]}


def _build_overlay(overlay: Overlay) -> dict[str, Any]:
    return {
        "runs": [
            {
                "row_number": one.run.row_number,
                "source": one.run.source,
                "layout": asdict(one.run.plan.layout),
                "plan": _describe_plan(one.run.plan),
                "measured_s": one.run.step_time_s,
                "predicted_s": one.step.total_s,
                "low_s": one.step.low_s,
                "high_s": one.step.high_s,
                "error_ratio": one.error_ratio,
                "is_in_band": one.is_in_band,
                "is_fitted": not one.is_counted,
            }
            for one in overlay.runs
        ],
        "left_out": [
            {"row_number": row.row_number, "source": row.source, "reason": row.reason} for row in overlay.left_out
        ],
    }


def _build_row(study: Study, size: SizeProjection, rank: int, projection: Projection) -> dict[str, Any]:
    plan, step, memory = projection.plan, projection.step, projection.memory
    return {
        "id": f"{size.num_gpus}-{rank}",
        "gpus": size.num_gpus,
        "rank": rank,
        "standing": asdict(projection.standing),
        "num_nodes": projection.num_nodes,
        "layout": asdict(plan.layout),
        "plan": _describe_plan(plan),
        "prediction": {
            "num_microbatches": plan.num_microbatches,
            "step_time_s": step.total_s,
            "low_s": step.low_s,
            "high_s": step.high_s,
            "parts_s": {name: getattr(step, name) for name in PARTS},
            "bottleneck": projection.bottleneck,
            "tokens_per_s": projection.tokens_per_s_per_gpu * projection.num_gpus,
            "tokens_per_s_per_gpu": projection.tokens_per_s_per_gpu,
            "mfu_ratio": estimate_mfu_ratio(projection, study.mfu_convention),
            "mfu_convention": study.mfu_convention,
            **_build_bill(study, projection),
        },
        "memory": {
            "total_bytes": memory.total_bytes,
            "pp_rank": memory.pp_rank,
            "num_in_flight": memory.num_in_flight,
            **{name: getattr(memory, name) for name in MEMORY_FIELDS},
        },
    }


def _build_bill(study: Study, projection: Projection) -> dict[str, Any]:
    names = ("num_steps", "days", "low_days", "high_days", "gpu_hours", "energy_mwh", "cost_usd")
    if study.train_tokens is None:
        return dict.fromkeys(names)
    bill = estimate_bill(projection, train_tokens=study.train_tokens, usd_per_gpu_hour=study.usd_per_gpu_hour)
    return {name: getattr(bill, name) for name in names}


def _describe_plan(plan: Plan) -> dict[str, Any]:
    values = ((name, getattr(plan, name)) for name in PLAN_FIELDS)
    return {name: asdict(value) if is_dataclass(value) else value for name, value in values}  # type: ignore[arg-type]


def _describe_model(model: ModelShape) -> dict[str, Any]:
    """The shape, and its numbers of parameters for readers of the file."""
    counts = dict(zip(COUNTS_OF_A_MODEL, (count_parameters(model), count_active_parameters(model)), strict=True))
    return {"name": model.name, "source": model.source} | counts | asdict(model)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Header:
    """It is read first: a file of another format has other fields."""

    format: Literal["megatron_hammer.scaling.projection"]
    format_version: Literal[1]


@dataclass(frozen=True, slots=True)
class _StudyOfFile:
    model: dict[str, Any]
    gpu: dict[str, Any]
    cluster: dict[str, Any]
    train_tokens: PositiveInt | None
    usd_per_gpu_hour: NonNegativeFloat | None


@dataclass(frozen=True, slots=True)
class _Prediction:
    step_time_s: PositiveFloat
    low_s: PositiveFloat
    high_s: PositiveFloat


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    gpus: int
    rank: int
    layout: dict[str, Any]
    plan: dict[str, Any]
    prediction: _Prediction


@dataclass(frozen=True, slots=True)
class _CostModel:
    coefficients: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _ProjectionFile:
    """The part of the file that is read. Plans are parsed apart, because they may have no unknown field."""

    study: _StudyOfFile
    rows: tuple[_Row, ...]
    cost_model: _CostModel | None = None


@dataclass(frozen=True, slots=True)
class _Subject:
    """What all plans of a projection have in common."""

    model: ModelShape
    gpu: Gpu
    cluster: Cluster


def read_projection(path: Path) -> SavedProjection:
    """Read a projection file. Raises ConfigError if it is missing, broken, or not from this version's `project`."""
    read_json(
        path, _Header, remedy="Pass projection.json of scaling_study.py project --output-dir.", raises=ConfigError
    )
    file = read_json(path, _ProjectionFile, remedy=REMEDY_OF_A_FIELD, raises=ConfigError)
    study = file.study
    model = {name: value for name, value in study.model.items() if name not in COUNTS_OF_A_MODEL}
    subject = {"model": model, "gpu": study.gpu, "cluster": study.cluster}
    # Checked before the rows, each of which would repeat its problems.
    _validate_strictly(subject, _Subject, f"{path}: study")
    rows = []
    for row in file.rows:
        plan = _validate_strictly({**subject, "layout": row.layout, **row.plan}, Plan, f"{path}: row {row.id}")
        _check_row(row, plan, path)
        rows.append(SavedRow(row_id=row.id, num_gpus=row.gpus, rank=row.rank, plan=plan, **asdict(row.prediction)))
    coefficients = None
    if file.cost_model is not None:
        coefficients = read_tables(file.cost_model.coefficients, where=f"{path}: cost_model.coefficients")
    return SavedProjection(
        path=path,
        train_tokens=study.train_tokens,
        rows=tuple(rows),
        coefficients=coefficients,
        usd_per_gpu_hour=study.usd_per_gpu_hour,
    )


def _check_row(row: _Row, plan: Plan, path: Path) -> None:
    """Raise ConfigError for a row whose parts contradict one another, as after an edit by hand."""
    step, ranks, row_id = row.prediction, plan.layout.world_size, f"{row.gpus}-{row.rank}"
    checks = (
        (row.id == row_id and row.rank >= 1, f"id must be {row_id}"),
        (row.gpus == ranks, f"gpus must be {ranks}, the ranks of its layout, got {row.gpus}"),
        (step.low_s <= step.step_time_s <= step.high_s, f"step_time_s must be within its band, got {asdict(step)}"),
    )
    problems = [f"{path}: row {row.id}: {text}. {REMEDY_OF_A_FIELD}" for is_good, text in checks if not is_good]
    if problems:
        raise ConfigError(*problems)


def _validate_strictly[T](values: dict[str, Any], kind: type[T], where: str) -> T:
    return validate(values, kind, where=where, remedy=REMEDY_OF_A_FIELD, raises=ConfigError, allows_unknown=False)
