"""Measured runs from a table: each row becomes a full Plan with its step time, or has the reason why not.

A blank cell is filled from a public configuration, from the source's own recipe or by a stated rule, and each such
value is one of the run's `assumptions`. A row with a blank that cannot be filled is unpredictable. `run_table.py` reads
the cells; `row_model.py`, `row_layout.py` and `software.py` have what is known; `row_step_time.py` turns throughput
into seconds.
"""

import functools
import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import PRESETS
from megatron_hammer.scaling.hardware.catalogue import (
    load_clusters,
    load_gpus,
    select_cluster,
    select_default_cluster,
    select_gpu,
)
from megatron_hammer.scaling.plan import Cluster, Gpu, Plan, Precision, Recompute, Sharding
from megatron_hammer.scaling.published.row_contradictions import find_contradictions
from megatron_hammer.scaling.published.row_experts import (
    DispatcherSiblings,
    collect_dispatchers,
    read_cuda_graphs,
    read_expert_options,
    read_recompute_modules,
)
from megatron_hammer.scaling.published.row_layout import (
    Siblings,
    build_row_layout,
    collect_siblings,
    name_source_family,
)
from megatron_hammer.scaling.published.row_memory import fill_memory_options, fit_in_memory
from megatron_hammer.scaling.published.row_model import UnpredictableError, build_row_model
from megatron_hammer.scaling.published.row_offload import read_offload
from megatron_hammer.scaling.published.row_step_time import find_step_time
from megatron_hammer.scaling.published.row_words import (
    list_formats,
    name_precision,
    name_recompute,
    name_sharding,
    read_shard_size,
    take_statement,
)
from megatron_hammer.scaling.published.run_table import MEASUREMENT_COLUMNS, RunRow, read_run_rows
from megatron_hammer.scaling.published.software import (
    SourceRecipe,
    TrainingSoftware,
    find_software_year,
    select_recipe,
    select_software,
)

LARGEST_ASSUMED_MICRO_BATCH = 4
VTRAIN_VOCAB_SIZE = 50_257  # VIA-Research/vTrain src/config.py


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    """One predictable row: the run as a Plan, and what was measured of it."""

    row_number: int  # its line in the file
    source: str
    model: str
    gpu_type: str  # as the table writes it
    plan: Plan
    step_time_s: float
    measured_as: str  # the column that the step time comes from
    assumptions: tuple[str, ...]
    fingerprint: str  # of the cells that identify the run; the same in every file
    is_megatron_style: bool
    notes: str = ""
    contradictions: tuple[str, ...] = ()  # cells of the row that cannot all be true

    @property
    def source_family(self) -> str:
        return name_source_family(self.source)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpredictableRow:
    """A row for which no step time can be predicted, or that has none to compare with, and why."""

    row_number: int
    source: str
    model: str
    reason: str
    is_megatron_style: bool = True


def read_runs(
    path: Path, *, gpus_path: Path | None = None, clusters_path: Path | None = None
) -> tuple[list[MeasuredRun], list[UnpredictableRow]]:
    """Every row of a CSV file, as a run or with the reason why not. No row is dropped.

    Raises ConfigError for an unreadable file or header, and with all malformed cells at once.
    """
    rows = read_run_rows(path)
    hardware = _Hardware(gpus_path, clusters_path)
    siblings = collect_siblings(rows)
    dispatchers = collect_dispatchers(rows)
    runs: list[MeasuredRun] = []
    unpredictable: list[UnpredictableRow] = []
    for row in rows:
        try:
            runs.append(_build_run(row, hardware, siblings, dispatchers))
        except UnpredictableError as error:
            unpredictable.append(
                UnpredictableRow(
                    row_number=row.row_number,
                    source=row.source,
                    model=row.model,
                    reason=str(error),
                    is_megatron_style=select_software(row, row.gpu_type.lower())[0].is_megatron_style,
                )
            )
    return runs, unpredictable


class _Hardware:
    """GPUs and clusters, read once: the shipped ones, changed and extended by the user's files."""

    def __init__(self, gpus_path: Path | None, clusters_path: Path | None):
        load_gpus(gpus_path)  # reports problems of the files before any row is read
        load_clusters(clusters_path, gpus_path=gpus_path)
        self._select_gpu = functools.cache(lambda name: select_gpu(name, gpus_path))
        self._select_cluster = functools.cache(lambda name: select_cluster(name, clusters_path, gpus_path=gpus_path))
        self._select_default_cluster = functools.cache(
            lambda name: select_default_cluster(name, clusters_path, gpus_path=gpus_path)
        )

    def select(self, row: RunRow) -> tuple[Gpu, TrainingSoftware, list[str]]:
        if not row.gpu_type:
            raise UnpredictableError("gpu_type is blank")
        try:
            gpu = self._select_gpu(row.gpu_type)
        except ConfigError as error:
            raise UnpredictableError(f"its GPU {row.gpu_type!r} is not known; describe it with --gpus-file") from error
        software, assumptions = select_software(row, gpu.name)
        variant = software.gpu_of_gpu.get(gpu.name)
        if variant is None:
            return gpu, software, list(assumptions)
        return self._select_gpu(variant), software, [*assumptions, f"GPU {variant}: the variant of its year"]

    def select_cluster(self, gpu: Gpu, software: TrainingSoftware) -> Cluster:
        name = software.cluster_of_gpu.get(gpu.name)
        if name is not None:
            return self._select_cluster(name)
        try:
            return self._select_default_cluster(gpu.name)
        except ConfigError as error:
            raise UnpredictableError(f"no cluster of {gpu.name} is known; describe one with --clusters-file") from error


def _build_run(row: RunRow, hardware: _Hardware, siblings: Siblings, dispatchers: DispatcherSiblings) -> MeasuredRun:
    if all(getattr(row, name) is None for name in MEASUREMENT_COLUMNS):
        raise UnpredictableError("it holds no measured time, throughput or utilisation")
    gpu, software, assumptions = hardware.select(row)
    if "vtrain" in row.source.lower() and row.vocab is None:
        row = replace(row, vocab=VTRAIN_VOCAB_SIZE)
        assumptions.append(f"vocab {VTRAIN_VOCAB_SIZE}: VIA-Research/vTrain src/config.py")
    model, model_assumptions = build_row_model(row)
    assumptions += model_assumptions
    row, recipe = _fill_from_recipe(row, gpu, assumptions)
    layout = build_row_layout(row, model, software, siblings, assumptions)
    seq_length = _fill_seq_length(row, software, assumptions)
    micro_batch, global_batch = _fill_batch(row, layout, software, assumptions)
    precision = _read_precision(row, gpu, software, assumptions)
    cluster = hardware.select_cluster(gpu, software)
    sharding, shard_size = _read_sharding(row, cluster, software, assumptions)
    if shard_size == layout.data_parallel_size:
        shard_size = None  # all ranks, including context-parallel ones
    if shard_size is not None and layout.dense_shard_size % min(shard_size, layout.dense_shard_size):
        raise UnpredictableError(
            f"shards over {shard_size} GPUs do not divide its {layout.dense_shard_size} data ranks"
        )
    offload = read_offload(row, sharding, model.num_layers, assumptions)
    recompute = _read_recompute(row, recipe, software, assumptions)
    plan = Plan(
        model=model,
        layout=replace(layout, has_distributed_optimizer=sharding == "distributed_optimizer"),
        gpu=gpu,
        cluster=cluster,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        global_batch_size=global_batch,
        precision=precision,
        recompute=recompute,
        recompute_modules=read_recompute_modules(row),
        sharding=sharding,
        shard_size=shard_size,
        has_flash_attention=software.has_flash_attention,
        overlaps_grad_reduce=software.overlaps_data_parallel,
        overlaps_param_gather=(
            software.overlaps_data_parallel and not software.gathers_parameters_alone and sharding != "none"
        ),
        overlaps_tensor_parallel=layout.tensor_model_parallel_size > 1 and _overlaps_tensor_parallel(row, software),
        gradient_bytes=_select_gradient_bytes(precision, recipe, software),
        experts=read_expert_options(row, software, dispatchers, assumptions),
        cuda_graphs=read_cuda_graphs(row, assumptions),
        context_exchange=software.context_exchange,
        software_year=find_software_year(row, software),
        **offload._asdict(),
    )
    plan = fit_in_memory(fill_memory_options(plan, row, recipe, software, assumptions), row, assumptions)
    if "deterministic" in row.notes.lower():
        assumptions.append("its kernels were the deterministic ones, which are slower and not modelled")
    step_time_s, measured_as = find_step_time(row, plan, software, assumptions)
    # The predicted batch was rounded to whole micro-batches, so the measured time is scaled to it.
    if row.global_batch is not None and row.global_batch != global_batch:
        step_time_s *= global_batch / row.global_batch
    return MeasuredRun(
        row_number=row.row_number,
        source=row.source,
        model=row.model,
        gpu_type=row.gpu_type,
        plan=plan,
        step_time_s=step_time_s,
        measured_as=measured_as,
        assumptions=tuple(assumptions),
        fingerprint=compute_fingerprint(row),
        is_megatron_style=software.is_megatron_style,
        notes=row.notes,
        contradictions=find_contradictions(row, plan),
    )


def _fill_from_recipe(row: RunRow, gpu: Gpu, assumptions: list[str]) -> tuple[RunRow, SourceRecipe | None]:
    recipe = select_recipe(row, gpu.name)
    if recipe is None:
        return row, None
    filled: dict[str, Any] = {}
    for name in ("tp", "pp", "cp", "vpp", "micro_batch", "seq", "dispatcher", "overlap_ep"):
        value = getattr(recipe, name)
        if value is not None and getattr(row, name) in (None, ""):
            filled[name] = value
    if recipe.samples_per_gpu is not None and row.global_batch is None and row.gpus is not None:
        filled["global_batch"] = round(recipe.samples_per_gpu * row.gpus)
    assumptions += [f"{name} {value}: {recipe.source}" for name, value in filled.items()]
    return replace(row, **filled), recipe


def _fill_seq_length(row: RunRow, software: TrainingSoftware, assumptions: list[str]) -> int:
    if row.seq is not None:
        return row.seq
    if software.seq_length is None:
        raise UnpredictableError("seq is blank and its source's sequence length is not known")
    assumptions.append(f"seq {software.seq_length}: {software.source}")
    return software.seq_length


def _fill_batch(
    row: RunRow, layout: ParallelLayout, software: TrainingSoftware, assumptions: list[str]
) -> tuple[int, int]:
    """(micro-batch, global batch). The global batch is a multiple of the micro-batch times the replicas."""
    dp, pp = layout.data_parallel_size, layout.pipeline_model_parallel_size
    micro_batch, global_batch = row.micro_batch, row.global_batch
    if global_batch is None:
        global_batch = _fill_global_batch(row, dp, assumptions)
    if software.name == "torchtitan" and pp > 1 and micro_batch is not None and micro_batch % pp == 0:
        assumptions.append(
            f"micro_batch {micro_batch // pp}: the row's is the local batch, which torchtitan cuts by pp"
        )
        micro_batch //= pp
    if micro_batch is None and row.experts is not None:
        # What NVIDIA's recipes for such models take, except the smallest ones.
        micro_batch = 1
        assumptions.append("micro_batch 1: blank, a model with experts")
    elif micro_batch is None:
        micro_batch = _assume_micro_batch(global_batch // dp, pp, software, assumptions)
    num_microbatches = global_batch // (micro_batch * dp)
    if num_microbatches == 0:
        raise UnpredictableError(f"its global batch {global_batch} is below micro-batch {micro_batch} x dp {dp}")
    if num_microbatches * micro_batch * dp != global_batch:
        assumptions.append(
            f"global_batch {num_microbatches * micro_batch * dp}: {global_batch} is no multiple of micro-batch "
            f"{micro_batch} x dp {dp}; the time is scaled"
        )
    return micro_batch, num_microbatches * micro_batch * dp


def _fill_global_batch(row: RunRow, dp: int, assumptions: list[str]) -> int:
    if row.iteration_time_s is not None:
        if row.tokens_per_s_per_gpu is None or row.gpus is None or row.seq is None:
            raise UnpredictableError("global_batch is blank, on which the time of a step depends")
        global_batch = round(row.tokens_per_s_per_gpu * row.gpus * row.iteration_time_s / row.seq)
        assumptions.append(f"global_batch {global_batch}: the row's tokens per second over its time")
        return global_batch
    if row.micro_batch is None:
        raise UnpredictableError("micro_batch and global_batch are blank")
    if row.experts is not None and (row.pp or 1) > 1:
        raise UnpredictableError("global_batch is blank, on which the bubble of its pipeline depends")
    smallest = row.micro_batch * dp
    preset = PRESETS.get("hammer-1b4") if "hammerllm" in row.model.lower() else None
    if preset is not None and preset.recipe.global_batch_size % smallest == 0:
        assumptions.append(f"global_batch {preset.recipe.global_batch_size}: {preset.recipe.source}")
        return preset.recipe.global_batch_size
    assumptions.append(f"global_batch {smallest}: blank, one micro-batch per replica")
    return smallest


def _assume_micro_batch(per_replica: int, pp: int, software: TrainingSoftware, assumptions: list[str]) -> int:
    if per_replica < 1:
        raise UnpredictableError("its global batch is smaller than its number of replicas")
    if not software.accumulates_gradients:
        assumptions.append(f"micro_batch {per_replica}: blank, gradients are not accumulated ({software.name})")
        return per_replica
    if pp > 1:
        assumptions.append("micro_batch 1: blank, a pipeline")
        return 1
    # The common divisor with a power of two is the largest power of two that divides both.
    micro_batch = math.gcd(per_replica, LARGEST_ASSUMED_MICRO_BATCH)
    assumptions.append(f"micro_batch {micro_batch}: blank, the largest power of two up to 4 that divides the batch")
    return micro_batch


def _read_precision(row: RunRow, gpu: Gpu, software: TrainingSoftware, assumptions: list[str]) -> Precision:
    if row.precision:
        precision = name_precision(row.precision)
        if precision is None:
            raise UnpredictableError(f"its precision {row.precision!r} is not known")
    else:
        precision = _fill_precision(row, software, assumptions)
    if precision == "mxfp8" and gpu.fp4_tflops is None:
        assumptions.append("precision fp8_blockwise: block scaling in software, as the GPU has no MXFP8")
        precision = "fp8_blockwise"
    if gpu.find_peak_tflops(precision) is None:
        raise UnpredictableError(f"its GPU {gpu.name} has no {precision}")
    return precision


def _fill_precision(row: RunRow, software: TrainingSoftware, assumptions: list[str]) -> Precision:
    """From the model's name or the notes if these name one format, else that of the software."""
    for where, text in (("the model's name", row.model), ("the notes", row.notes)):
        formats = list_formats(text)
        if len(formats) == 1:
            assumptions.append(f"precision {formats[0]}: blank, {where}")
            return formats[0]
    assumptions.append(f"precision {software.precision}: blank, {software.name}")
    return software.precision


def _read_recompute(
    row: RunRow, recipe: SourceRecipe | None, software: TrainingSoftware, assumptions: list[str]
) -> Recompute:
    if not take_statement(row.recompute):
        recompute = (recipe.recompute if recipe else None) or software.recompute
        reason = recipe.source if recipe and recipe.recompute else software.name
        assumptions.append(f"recompute {recompute}: blank, {reason}")
        return recompute
    named = name_recompute(row.recompute)
    if named is None:
        raise UnpredictableError(f"its recomputation {row.recompute!r} is not known")
    return named


def _read_sharding(
    row: RunRow, cluster: Cluster, software: TrainingSoftware, assumptions: list[str]
) -> tuple[Sharding, int | None]:
    """(what is sharded, over how many ranks). None means all ranks."""
    text = row.sharding.lower()
    if not text:
        assumptions.append(f"sharding {software.sharding}: blank, {software.name}")
        return software.sharding, None
    sharding = name_sharding(text)
    if sharding is None:
        assumptions.append(f"sharding {software.sharding}: {row.sharding!r} is not known, {software.name}")
        return software.sharding, None
    size = read_shard_size(text)
    if size is None and ("hybrid" in text or "hsdp" in text):
        size = cluster.gpus_per_node
        assumptions.append(f"shards over {size} GPUs: hybrid sharding keeps to a node")
    return sharding, None if sharding == "none" else size


def _overlaps_tensor_parallel(row: RunRow, software: TrainingSoftware) -> bool:
    return software.overlaps_tensor_parallel or bool(re.search(r"async ?tp", row.notes.lower()))


def _select_gradient_bytes(precision: Precision, recipe: SourceRecipe | None, software: TrainingSoftware) -> int:
    if precision == "fp32":
        return 4
    return (recipe.gradient_bytes if recipe else None) or software.gradient_bytes


# The digest depends on these names' order. Another order would make the fingerprints of every written coefficients file
# unknown.
_IDENTIFYING_FIELDS = (
    "model", "layers", "hidden", "seq", "gpus", "gpu_type", "tp", "pp", "vpp", "cp", "micro_batch", "global_batch",
    "precision", "recompute", "sharding",
)  # fmt: skip


def compute_fingerprint(row: RunRow) -> str:
    """16 hexadecimal digits that identify a measured run, independent of its file, line and source name."""
    measured = next(getattr(row, name) for name in MEASUREMENT_COLUMNS if getattr(row, name) is not None)
    cells = [getattr(row, name) for name in _IDENTIFYING_FIELDS]
    texts = ["" if cell is None else cell.lower().strip() if isinstance(cell, str) else f"{cell}" for cell in cells]
    # The first tables did not have these columns. A blank is left out, so their fingerprints stay valid.
    later = {
        "sequence_parallel": row.sequence_parallel, "ep": row.ep, "etp": row.etp, "dispatcher": row.dispatcher or None,
        "cuda_graphs": row.cuda_graphs or None, "overlap_ep": row.overlap_ep, "routing": row.routing or None,
    }  # fmt: skip
    texts += [f"{name}={cell}" for name, cell in later.items() if cell is not None]
    return hashlib.sha256("|".join([*texts, f"{measured:.6g}"]).encode()).hexdigest()[:16]
