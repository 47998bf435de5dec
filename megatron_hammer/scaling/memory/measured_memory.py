"""Measured memory figures from a table: each row becomes a run with its figure, or has the reason why not.

The columns are those of the published memory table (`quantity`, `memory_value`, `unit`, and the run's). Blanks are
filled by named assumptions: the model from its name (`evidence/row_model.py`), the rest from what is known about the
source's software (`software.py`). No row is dropped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import MemoryOptions, ParallelLayout
from megatron_hammer.model.layout import find_grid_problems
from megatron_hammer.model.memory.estimate import EXPANDABLE_FRAGMENTATION_RATIO, FRAGMENTATION_RATIO
from megatron_hammer.model.memory.options import RecomputeModule
from megatron_hammer.model.parameters import find_shard_problems
from megatron_hammer.model.pipeline_split import find_split_problems
from megatron_hammer.model.shape import ModelShape, MoeShape
from megatron_hammer.scaling.memory.measured_quantity import MemoryKind, read_measurement
from megatron_hammer.scaling.memory.software import (
    MemorySoftware,
    StageChoice,
    load_known_memory_software,
    select_memory_software,
)
from megatron_hammer.scaling.plan import Precision, Recompute, Sharding
from megatron_hammer.scaling.published.row_model import UnpredictableError, build_row_model
from megatron_hammer.scaling.published.row_offload import read_offload
from megatron_hammer.scaling.published.row_words import (
    name_precision,
    name_recompute,
    name_sharding,
    read_shard_size,
    take_statement,
)
from megatron_hammer.scaling.published.run_table import MemoryRow, read_memory_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredMemory:
    """One figure and the run that it belongs to. measured: in bytes, or a ratio for activation_ratio."""

    row_number: int  # its line in the file; the header is line 1
    source: str
    name: str
    quantity: str
    kind: MemoryKind
    measured: float
    measured_or_model: str
    stage: StageChoice
    model: ModelShape
    layout: ParallelLayout
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    options: MemoryOptions
    fragmentation_ratio: float = FRAGMENTATION_RATIO
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpredictableMemoryRow:
    """A row for which no memory can be predicted, and why."""

    row_number: int
    source: str
    model: str
    quantity: str
    measured_or_model: str
    reason: str


def read_measured_memory(path: Path) -> tuple[list[MeasuredMemory], list[UnpredictableMemoryRow]]:
    """Every row of a CSV file in its order, as a run or with the reason why not.

    Raises ConfigError for an unreadable file, a header without the columns that say what was measured, or bad cells.
    """
    rows: list[MeasuredMemory] = []
    unpredictable: list[UnpredictableMemoryRow] = []
    for row in read_memory_rows(path):
        try:
            rows.append(_build_measured_memory(row))
        except (UnpredictableError, ConfigError) as error:
            unpredictable.append(
                UnpredictableMemoryRow(
                    row_number=row.row_number,
                    source=row.source,
                    model=row.model,
                    quantity=row.quantity,
                    measured_or_model=row.measured_or_model,
                    reason=str(error),
                )
            )
    return rows, unpredictable


def _build_measured_memory(row: MemoryRow) -> MeasuredMemory:
    """The run of one row. Raises UnpredictableError if the row does not say enough."""
    software = select_memory_software(row.source)
    kind, measured = read_measurement(row, software)
    _refuse_what_is_not_modelled(row)
    assumptions: list[str] = []
    changes = _apply_name_rules(row, assumptions)
    software = replace(software, **_select_fields(changes, MemorySoftware))
    seq_length = _count_or_assume(row, "seq", software.seq_length, software, assumptions)
    model = _build_model(row, software, changes, assumptions)
    layout = _build_layout(row, model, software, changes, assumptions)
    micro_batch_size = _count_or_assume(row, "micro_batch", software.micro_batch_size, software, assumptions)
    num_microbatches = _count_microbatches(row, layout, micro_batch_size, assumptions)
    pp = layout.pipeline_model_parallel_size
    if software.cuts_local_batch and pp > 1 and micro_batch_size % pp == 0:
        num_microbatches, micro_batch_size = pp, micro_batch_size // pp
        assumptions.append(f"micro-batches of {micro_batch_size} sequences: {software.name} cuts the local batch by pp")
    return MeasuredMemory(
        row_number=row.row_number,
        source=row.source,
        name=row.model,
        quantity=row.quantity,
        kind=kind,
        measured=measured,
        measured_or_model=row.measured_or_model,
        stage=_read_stage(row, software),
        model=model,
        layout=layout,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches,
        options=_build_options(row, software, model, layout.pipeline_model_parallel_size > 1, assumptions),
        fragmentation_ratio=EXPANDABLE_FRAGMENTATION_RATIO if software.has_expandable_segments else FRAGMENTATION_RATIO,
        assumptions=tuple(assumptions),
    )


def _read_stage(row: MemoryRow, software: MemorySoftware) -> StageChoice:
    text = row.quantity.lower()
    if "first stage" in text or "rank 0" in text:
        return "first"
    return "last" if "last" in text else software.stage


def _refuse_what_is_not_modelled(row: MemoryRow) -> None:
    """Raise UnpredictableError for models and trainings that the memory model does not support."""
    text = f"{row.model} {row.quantity} {row.recompute}".lower()
    if re.search(r"deepseek|moonlight|kimi|mla", text):
        raise UnpredictableError("its multi-latent attention is not modelled")
    if "lora" in text:
        raise UnpredictableError("adapters beside frozen weights are not modelled")
    if "offload" in f"{row.model} {row.quantity}".lower():
        raise UnpredictableError("what of it is offloaded to the host is not stated: say so in sharding or recompute")
    if row.source.startswith("Korthikanti2022_AppB"):
        raise UnpredictableError("sequence, micro-batch and recomputation of the figure are not given")


# --- the run --------------------------------------------------------------------------------------------------------


def _apply_name_rules(row: MemoryRow, assumptions: list[str]) -> dict[str, Any]:
    """Fields that words in the row's name or quantity determine, by field name."""
    source = row.source.lower()
    name = row.model.lower()
    text = _spell(name), name, row.quantity.lower(), f"{row.gpu_type} {row.provenance} {name}".lower()
    changes: dict[str, Any] = {}
    for rule in load_known_memory_software().name_rule:
        if re.search(rule.source_pattern, source) and any(re.search(rule.pattern, words) for words in text):
            changes.update(rule.changes)
            assumptions.append(f"{rule.says}: its name")
    return changes


def _select_fields(changes: Mapping[str, Any], kind: type) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in changes.items() if name in names}


def _spell(model: str) -> str:
    """llama3_70b and llama3-70b are the same name. Names of Megatron-LM's test cases keep their underscores."""
    return re.sub(r"^(llama|qwen|mixtral)([\d.]*)_", r"\1\2-", model.strip().lower())


def _build_model(
    row: MemoryRow, software: MemorySoftware, changes: Mapping[str, Any], assumptions: list[str]
) -> ModelShape:
    row = replace(row, model=_spell(row.model), params_b=None)  # the note about parameters is for runs
    if row.vocab is None and software.vocab_size is not None:
        row = replace(row, vocab=software.vocab_size)
        assumptions.append(f"vocab {software.vocab_size}: {software.name}")
    model, notes = build_row_model(row)
    assumptions += notes
    if "swiglu" in row.model and row.hidden and row.ffn == 4 * row.hidden:
        # Megatron's default for SwiGLU: two thirds of 4 x hidden, rounded down to a multiple of 64.
        ffn = int(4 * row.hidden * 2 / 3 / 64) * 64
        model = replace(model, activation="swiglu", ffn_hidden_size=ffn)
        assumptions.append(f"ffn {ffn}: Megatron's default for SwiGLU; the row's 4 x hidden is its default without")
    experts = re.search(r"_(\d+)experts", row.model)
    if experts and "moe_topk" in changes:
        moe = MoeShape(
            num_experts=int(experts[1]), router_topk=changes["moe_topk"], ffn_hidden_size=model.ffn_hidden_size
        )
        model = replace(model, moe=moe)
        assumptions.append(f"{moe.num_experts} experts, {moe.router_topk} per token: its name")
    return replace(model, **_select_fields(changes, ModelShape))


def _build_layout(
    row: MemoryRow,
    model: ModelShape,
    software: MemorySoftware,
    changes: Mapping[str, Any],
    assumptions: list[str],
) -> ParallelLayout:
    tp, pp = (
        _count_or_assume(row, "tp", 1, software, assumptions),
        _count_or_assume(row, "pp", 1, software, assumptions),
    )
    cp, vpp = row.cp or 1, row.vpp or 1
    dp = _count_replicas(row, tp * pp * cp, software, assumptions)
    has_sequence_parallel = row.sequence_parallel
    if has_sequence_parallel is None:
        has_sequence_parallel = software.has_sequence_parallel and tp > 1
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        has_sequence_parallel=has_sequence_parallel,
        expert_model_parallel_size=row.ep or 1,
        **_select_fields(changes, ParallelLayout),
    )
    if find_split_problems(model.num_layers, layout):
        both_ends = replace(layout, accounts_for_embedding=True, accounts_for_loss=True)
        if not find_split_problems(model.num_layers, both_ends):
            layout = both_ends
            assumptions.append("embedding and loss stand for a layer each: else its stages do not come out even")
    problems = [*find_grid_problems(layout), *find_split_problems(model.num_layers, layout)]
    problems += find_shard_problems(model, layout)
    if problems:
        raise UnpredictableError(f"its layout cannot be built: {problems[0]}")
    return layout


def _count_replicas(row: MemoryRow, ranks: int, software: MemorySoftware, assumptions: list[str]) -> int:
    dp, gpus = row.dp, row.gpus
    if dp is not None:
        return dp
    if gpus is None:
        if software.data_parallel_size is None:
            raise UnpredictableError("gpus and dp are blank")
        assumptions.append(f"dp {software.data_parallel_size}: neither it nor the GPUs are stated")
        return software.data_parallel_size
    if gpus % ranks:
        raise UnpredictableError(f"its {gpus} GPUs are no multiple of the {ranks} ranks of a model copy")
    return gpus // ranks


def _count_microbatches(row: MemoryRow, layout: ParallelLayout, micro_batch_size: int, assumptions: list[str]) -> int:
    named = re.search(r"mbc(\d+)", row.quantity)
    if named:
        return int(named[1])
    global_batch = row.global_batch
    if global_batch is not None:
        return max(1, global_batch // (micro_batch_size * layout.data_parallel_size))
    # pp * (vpp + 1) micro-batches are more than any stage holds at once, so more would not change the memory.
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if pp > 1:
        assumptions.append("enough micro-batches to fill the pipeline: global_batch is blank")
    return pp * (vpp + 1)


def _count_or_assume(
    row: MemoryRow, name: str, default: int | None, software: MemorySoftware, assumptions: list[str]
) -> int:
    number: int | None = getattr(row, name)
    if number is not None:
        return number
    if default is None:
        raise UnpredictableError(f"{name} is blank and not known of {software.name}")
    assumptions.append(f"{name} {default}: blank, {software.name}")
    return default


# --- options --------------------------------------------------------------------------------------------------------


def _build_options(
    row: MemoryRow, software: MemorySoftware, model: ModelShape, has_pipeline: bool, assumptions: list[str]
) -> MemoryOptions:
    recompute, modules = _read_recompute(row, software, assumptions)
    sharding, shard_size = _read_sharding(row, software, assumptions)
    offload = read_offload(row, sharding, model.num_layers, assumptions)
    precision = _read_precision(row, software, assumptions)
    # The memory of fp16 is that of bf16. Without lasting 8-bit copies, 8-bit training needs the memory of 16 bits too.
    if precision == "fp16" or (precision != "fp32" and not software.keeps_quantized):
        precision = "bf16"
    return MemoryOptions(
        precision=precision,
        recompute=recompute,
        recompute_modules=modules,
        has_hidden_dropout=software.has_dropout,
        has_attention_dropout=software.has_dropout,
        has_flash_attention=software.has_flash_attention,
        cross_entropy=software.cross_entropy,
        is_context_parallel_all_to_all=software.is_context_parallel_all_to_all,
        sharding=sharding,
        shard_size=shard_size or software.shard_size,
        reshards_after_forward=software.reshards_in_pipeline or not has_pipeline,
        has_fused_activation=software.has_fused_activation,
        gradient_bytes=software.gradient_bytes,
        master_bytes=software.master_bytes,
        has_fused_weight_gradients=software.has_fused_weight_gradients,
        has_quantized_parameters=software.has_quantized_parameters,
        workspace_bytes=software.workspace_bytes,
        **offload._asdict(),
    )


def _read_precision(row: MemoryRow, software: MemorySoftware, assumptions: list[str]) -> Precision:
    if not row.precision:
        assumptions.append(f"precision {software.precision}: blank, {software.name}")
        return software.precision
    precision = name_precision(row.precision)
    if precision is None:
        raise UnpredictableError(f"its precision {row.precision!r} is not known")
    return precision


def _read_recompute(
    row: MemoryRow, software: MemorySoftware, assumptions: list[str]
) -> tuple[Recompute, tuple[RecomputeModule, ...]]:
    core = software.selective_modules
    text = take_statement(row.recompute)
    if not text:
        assumptions.append(f"recompute {software.recompute}: blank, {software.name}")
        return software.recompute, core
    if text == "[]" or name_recompute(text) == "none":
        return "none", core
    if text in ("full", "selective"):
        return ("full" if text == "full" else "selective"), core
    modules = [word.strip() for word in re.split(r"[,+]", text)]
    unknown = [word for word in modules if word not in get_args(RecomputeModule)]
    if unknown:
        raise UnpredictableError(f"its recomputation {row.recompute!r} is not known")
    return "selective", tuple(modules)  # type: ignore[arg-type]


def _read_sharding(row: MemoryRow, software: MemorySoftware, assumptions: list[str]) -> tuple[Sharding, int | None]:
    """(what is sharded, over how many ranks). None means all ranks."""
    text = row.sharding.lower()
    if not text:
        assumptions.append(f"sharding {software.sharding}: blank, {software.name}")
        return software.sharding, None
    if software.sharding == "fsdp":
        return "fsdp", None
    sharding = name_sharding(text)
    if sharding is None:
        raise UnpredictableError(f"its sharding {row.sharding!r} is not known")
    return sharding, None if sharding == "none" else read_shard_size(text)
