"""A dry run's report for people: rich tables on stdout. `report.py` says what every number means."""

from collections.abc import Iterable
from typing import IO

from rich.table import Table

from megatron_hammer.config.dry_run.report import (
    ConversationReport,
    GridAxis,
    ModelReport,
    Report,
    RunReport,
    StageReport,
)
from megatron_hammer.files.tables import build_table, open_console
from megatron_hammer.model.byte_units import GIB

MAX_STAGE_ROWS = 64
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits")  # the others are summed in one
AXIS_NAMES = {
    "tp": "tensor",
    "cp": "context",
    "dp": "data",
    "pp": "pipeline",
    "etp": "expert tensor",
    "ep": "expert",
    "edp": "expert data",
}


def print_tables(report: Report, stream: IO[str]) -> None:
    """Print the report without its problems."""
    console = open_console(stream)
    console.print(_build_configuration(report))
    if report.model is not None:
        console.print(_build_model(report.model))
    if report.grid is not None:
        console.print(_build_grid(report.grid, report.world_size))
    if report.stages is not None:
        console.print(_build_stages(report.stages))
        console.print(_build_memory(report))
    if report.run is not None:
        console.print(_build_run(report.run))
    if report.run is not None and report.run.sources:
        console.print(_build_sources(report.run))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table to add rows to; its first `left` columns are text and the others numbers."""
    table = build_table(title, columns, (), num_text=left)
    table.show_header = any(columns)
    return table


def _build_configuration(report: Report) -> Table:
    table = _table("Configuration (what differs from Megatron's defaults)", "setting", "value", "preset", left=3)
    table.add_row("preset", report.preset or "none", "")
    table.add_row("platform, backend, precision", f"{report.platform}, {report.backend}, {report.precision}", "")
    table.add_row("first weights", report.weights, "")
    replaced = {override.name: override for override in report.overrides}
    names = sorted(set(report.settings) | set(replaced))
    for name in names:
        value = replaced[name].value if name in replaced else report.settings[name]
        table.add_row(name, str(value), f"was {replaced[name].preset_value}" if name in replaced else "")
    return table


def _build_model(model: ModelReport) -> Table:
    table = _table("Model (exact)", "", "", left=1)
    table.add_row("layers x hidden size", f"{model.num_layers} x {model.hidden_size:,}")
    table.add_row("parameters", f"{model.num_parameters:,}")
    table.add_row("parameters, vocabulary padded", f"{model.num_parameters_padded:,}")
    # They differ only in a mixture of experts.
    if model.num_active_parameters != model.num_parameters:
        table.add_row("active parameters per token", f"{model.num_active_parameters:,}")
    table.add_row("vocabulary, padded", f"{model.vocab_size:,}, {model.padded_vocab_size:,}")
    return table


def _build_grid(grid: tuple[GridAxis, ...], world_size: int) -> Table:
    table = _table(f"Rank grid ({world_size:,} ranks)", "axis", "coordinate of a rank", "size", "last rank", left=2)
    for axis in grid:
        coordinate = f"rank // {axis.stride} % {axis.size}"
        last = (world_size - 1) // axis.stride % axis.size
        table.add_row(f"{axis.name} ({AXIS_NAMES[axis.name]})", coordinate, f"{axis.size:,}", f"{last:,}")
    return table


def _build_stages(stages: tuple[StageReport, ...]) -> Table:
    has_experts = any(stage.expert_parameters for stage in stages)
    columns = ["stage", "layers", "parameters per rank"]
    columns += ["of experts"] if has_experts else []
    table = _table("Pipeline stages (exact)", *columns, "optimizer shard", left=2)
    for stage in _select_rows(stages):
        cells = [str(stage.pp_rank), " | ".join(_name_range(chunk) for chunk in stage.layers)]
        cells.append(f"{stage.dense_parameters + stage.expert_parameters:,}")
        cells += [f"{stage.expert_parameters:,}"] if has_experts else []
        table.add_row(*cells, f"{stage.optimizer_shard_parameters:,}")
    return table


def _build_memory(report: Report) -> Table:
    stages = [stage for stage in report.stages or () if stage.memory_bytes is not None]
    available = "" if report.available_bytes is None else f" of {report.available_bytes / GIB:.1f} available"
    title = f"Memory of a rank by stage (estimated, GiB{available}; recompute: {report.recompute})"
    table = _table(title, "stage", *MEMORY_COLUMNS, "other", "total")
    table.caption, table.caption_justify = "other: buffers, transient tensors, CUDA and NCCL, fragmentation", "left"
    for stage in _select_rows(stages):
        sizes = stage.memory_bytes or {}
        shown = [sizes.get(name, 0) for name in MEMORY_COLUMNS]
        total = stage.memory_total_bytes or 0
        # By difference, so the row always adds up, whatever parts the estimate has.
        cells = [*shown, total - sum(shown), total]
        table.add_row(str(stage.pp_rank), *(f"{size / GIB:.2f}" for size in cells))
    return table


def _build_run(run: RunReport) -> Table:
    table = _table("Run", "", "", left=1)
    table.add_row("micro-batch, global batch", f"{run.micro_batch_size:,}, {run.global_batch_size:,}")
    table.add_row("micro-batches per step and rank", f"{run.num_microbatches:,}")
    table.add_row("sequence length", f"{run.seq_length:,}")
    table.add_row("tokens per step", f"{run.tokens_per_step:,}")
    table.add_row("steps", f"{run.num_steps:,}")
    table.add_row("tokens", f"{run.num_tokens:,}")
    table.add_row("FLOPs per token", f"{run.flops_per_token:,}")
    table.add_row("convention", run.flop_convention)
    table.add_row("FLOPs of the run", f"{run.total_flops:.4g}")
    table.add_row("data", ", ".join(run.data_flags) or "none named: a run needs --data-path, or --mock-data")
    if run.split_tokens is not None:
        table.add_row("tokens of train, valid, test", ", ".join(f"{size:,}" for size in run.split_tokens.values()))
    if run.conversations is not None:
        table.add_row("conversations", describe_conversations(run.conversations))
    if run.epochs is not None:
        table.add_row("epochs of the training data", f"{run.epochs:.3f}")
    if run.data_order is not None:
        table.add_row("data order", run.data_order)
    return table


def describe_conversations(found: ConversationReport) -> str:
    """1,200 in 90 sequences (packed conversations), 1.2 % padding, 3 cut at their end"""
    words = [
        f"{found.num_conversations:,} in {found.num_sequences:,} sequences ({found.rows})",
        f"{found.padding_share:.1%} padding",
    ]
    if found.num_truncated:
        words.append(f"{found.num_truncated:,} cut at their end")
    return ", ".join(words)


def _build_sources(run: RunReport) -> Table:
    table = _table("Training blend", "prefix", "share of the run", "tokens", "epochs", "order")
    for source in run.sources:
        table.add_row(
            source.prefix,
            f"{source.weight:.4f}",
            f"{source.num_tokens:,}",
            f"{source.epochs:.3f}",
            source.shuffling or "",
        )
    return table


def _select_rows(stages: Iterable[StageReport]) -> list[StageReport]:
    """The first and the last of very many stages; the JSON report has all."""
    rows = list(stages)
    return rows if len(rows) <= MAX_STAGE_ROWS else [*rows[: MAX_STAGE_ROWS - 1], rows[-1]]


def _name_range(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
