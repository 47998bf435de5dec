"""The report of --dry-run: what would run, in numbers that are exact or say that they are estimates.

Time is left out on purpose: nothing here has been measured. Needs no GPU and no process group.
"""

import enum
import itertools
import json
import sys
from collections.abc import Sequence
from typing import IO, Any

from megatron_hammer.config.arguments import ParsedArguments
from megatron_hammer.config.dry_run.report import (
    ConversationReport,
    GridAxis,
    ModelReport,
    Override,
    Report,
    RunReport,
    SourceReport,
    StageReport,
)
from megatron_hammer.config.dry_run.tables import print_tables
from megatron_hammer.config.flags import Flags
from megatron_hammer.config.megatron_checks import read_megatron_defaults
from megatron_hammer.config.preflight.conversations import count_split_rows
from megatron_hammer.config.preflight.data import read_indices
from megatron_hammer.config.preflight.data_order import describe_order_state
from megatron_hammer.config.preflight.layout import find_run_layout_problems
from megatron_hammer.config.preflight.memory import estimate_run_memory, read_available_bytes
from megatron_hammer.config.preset_arguments import preset_arguments
from megatron_hammer.config.run_plan import RunPlan
from megatron_hammer.config.saved_run import describe_weights
from megatron_hammer.data.conversations.packing import RowLayout
from megatron_hammer.data.order.describe import describe_epochs
from megatron_hammer.data.order.run_order import plan_run_order
from megatron_hammer.data.sources import SPLIT_NAMES, DataPlan, count_split_tokens
from megatron_hammer.model.accounting import (
    FLOP_CONVENTIONS,
    FlopConvention,
    ParallelLayout,
    StageMemory,
    count_active_parameters,
    count_flops_per_token,
    count_optimizer_shard,
    count_parameters,
    count_rank_parameters,
    padded_vocab_size,
    split_layers,
)
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.preset import Preset

CONVENTION: FlopConvention = "A"
# Derived by this package for its platform and backend, or of no interest in a list of settings.
UNLISTED = frozenset({"preset", "platform", "backend", "dry_run", "json", "verbose", "requested_world_size", "help"})


def build_dry_run_report(arguments: ParsedArguments, problems: Sequence[str]) -> Report:
    """Everything that can be said about the run; `problems` are those of preflight.find_problems."""
    settings, plan = arguments.settings, arguments.plan
    model, layout = settings.model, settings.layout
    # Stages and memory are computed by divisions that only a fitting layout allows.
    fits = model is not None and not find_run_layout_problems(settings)
    divisible_by = settings.vocab_divisible_by
    memory = estimate_run_memory(plan) if plan is not None and fits else None
    return Report(
        preset=settings.preset.name if settings.preset else None,
        platform=settings.machine.platform,
        backend=settings.machine.backend,
        precision=settings.precision,
        world_size=settings.machine.world_size,
        weights=describe_weights(settings.checkpoints, settings.initial_model),
        overrides=() if settings.preset is None else _list_overrides(settings.flags, settings.preset),
        settings=_list_settings(settings.flags),
        model=_report_model(settings.model_name, model, layout, divisible_by) if model and layout else None,
        grid=list_grid_axes(layout) if layout and fits else None,
        stages=_report_stages(model, layout, divisible_by, memory) if model and layout and fits else None,
        available_bytes=read_available_bytes(settings.machine),
        recompute=settings.recompute,
        run=_report_run(plan) if plan is not None and fits and plan.schedule.length else None,
        problems=tuple(problems),
    )


def print_report(report: Report, stream: IO[str] | None = None, *, as_json: bool = False) -> None:
    """The report on `stream` (stdout by default), as tables or as one JSON object; then the problems on stderr."""
    stream = stream or sys.stdout
    if as_json:
        print(json.dumps(report.to_json(), indent=2), file=stream)
    else:
        print_tables(report, stream)
    # Before the problems: stdout is buffered where it is a file, so its tables could come after them.
    stream.flush()
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    num_problems = len(report.problems)
    verdict = f"{num_problems} problem{'s' if num_problems != 1 else ''}"
    print(f"dry run: {verdict}, nothing was started", file=sys.stderr)


# --- configuration --------------------------------------------------------------------------------------------------


def _list_overrides(flags: Flags, preset: Preset) -> tuple[Override, ...]:
    return tuple(
        Override(name=name, preset_value=_plain(value), value=_plain(flags[name]))
        for name, value in preset_arguments(preset).items()
        if name in flags.typed and flags[name] != value
    )


def _list_settings(flags: Flags) -> dict[str, Any]:
    defaults = read_megatron_defaults()
    return {
        name: _plain(value)
        for name, value in sorted(flags.values.items())
        # A leading underscore marks Megatron's own notes, such as _is_global_batch_size_explicitly_specified.
        if name not in UNLISTED and not name.startswith("_") and name in defaults and value != defaults[name]
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    # By name: the number of an enum says nothing to a reader.
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- model and ranks ------------------------------------------------------------------------------------------------


def _report_model(name: str, model: ModelShape, layout: ParallelLayout, divisible_by: int) -> ModelReport:
    rows = padded_vocab_size(
        model.vocab_size,
        divisible_by=divisible_by,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
    )
    return ModelReport(
        name=name,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_parameters=count_parameters(model),
        num_parameters_padded=count_parameters(model, rows),
        num_active_parameters=count_active_parameters(model),
        vocab_size=model.vocab_size,
        padded_vocab_size=rows,
    )


def list_grid_axes(layout: ParallelLayout) -> tuple[GridAxis, ...]:
    """The axes in mcore's order tp-cp-dp-pp, and for experts etp-ep-edp over the same ranks of a stage."""
    tp, cp, dp = layout.tensor_model_parallel_size, layout.context_parallel_size, layout.data_parallel_size
    axes = [
        GridAxis(name="tp", size=tp, stride=1),
        GridAxis(name="cp", size=cp, stride=tp),
        GridAxis(name="dp", size=dp, stride=tp * cp),
        GridAxis(name="pp", size=layout.pipeline_model_parallel_size, stride=tp * cp * dp),
    ]
    ep = layout.expert_model_parallel_size
    if ep > 1:
        etp = layout.expert_tp
        axes += [
            # Experts are laid out over the same ranks again, with other sizes.
            GridAxis(name="etp", size=etp, stride=1),
            GridAxis(name="ep", size=ep, stride=etp),
            GridAxis(name="edp", size=layout.expert_data_parallel_size, stride=etp * ep),
        ]
    return tuple(axes)


def _report_stages(
    model: ModelShape, layout: ParallelLayout, divisible_by: int, memory: Sequence[StageMemory] | None
) -> tuple[StageReport, ...]:
    stages = []
    for pp_rank, chunks in enumerate(split_layers(model.num_layers, layout)):
        local = count_rank_parameters(model, layout, pp_rank, vocab_divisible_by=divisible_by)
        shard = count_optimizer_shard(model, layout, pp_rank, vocab_divisible_by=divisible_by)
        stages.append(
            StageReport(
                pp_rank=pp_rank,
                layers=tuple(tuple(chunk.list_layers()) for chunk in chunks),
                dense_parameters=local.dense,
                expert_parameters=local.expert,
                optimizer_shard_parameters=shard.total,
                memory_bytes=memory[pp_rank].list_parts() if memory else None,
                memory_total_bytes=memory[pp_rank].total_bytes if memory else None,
            )
        )
    return tuple(stages)


# --- run and data ---------------------------------------------------------------------------------------------------


def _report_run(plan: RunPlan) -> RunReport:
    batch = plan.batch.global_batch_size
    num_tokens = (plan.schedule.train_samples or plan.num_steps * batch) * plan.seq_length
    flops_per_token = count_flops_per_token(plan.model, plan.seq_length, CONVENTION)
    split_tokens, sources = _report_data(plan, num_tokens)
    train_tokens = split_tokens["train"] if split_tokens else 0
    return RunReport(
        micro_batch_size=plan.batch.micro_batch_size,
        global_batch_size=batch,
        num_microbatches=plan.num_microbatches,
        seq_length=plan.seq_length,
        tokens_per_step=batch * plan.seq_length,
        num_steps=plan.num_steps,
        num_tokens=num_tokens,
        flops_per_token=flops_per_token,
        flop_convention=f"{CONVENTION}: {FLOP_CONVENTIONS[CONVENTION]}",
        total_flops=flops_per_token * num_tokens,
        data_flags=plan.data.flags,
        split_tokens=split_tokens,
        epochs=num_tokens / train_tokens if train_tokens else None,
        data_order=describe_order_state(plan) if split_tokens else None,
        sources=sources,
        conversations=_report_conversations(plan) if split_tokens else None,
    )


def _report_data(plan: RunPlan, run_tokens: int) -> tuple[dict[str, int] | None, tuple[SourceReport, ...]]:
    """Tokens of every split, and the sources of the training blend; (None, ()) without readable data."""
    data_sets = plan.data.sources
    indices, index_problems = read_indices(data_sets)
    # Mock data has no size, and unreadable data is reported as a problem.
    if data_sets.is_mock or plan.data.problems or index_problems or not indices:
        return None, ()
    tokens = {
        name: {
            source.prefix: count_split_tokens(indices[source.prefix], data_sets.bounds_of(name))
            for source in data_sets.sources_of(name)
        }
        for name in SPLIT_NAMES
    }
    split_tokens = {name: sum(by_prefix.values()) for name, by_prefix in tokens.items()}
    if plan.rows is not None:
        return _report_rows(plan, plan.rows, run_tokens)
    order = plan_run_order(plan.order)
    shufflings = [describe_epochs(source) for source in order.sources] if order else []
    return split_tokens, _report_sources(data_sets, tokens["train"], run_tokens, shufflings)


def _report_rows(plan: RunPlan, rows: RowLayout, run_tokens: int) -> tuple[dict[str, int], tuple[SourceReport, ...]]:
    """The same of conversations, in positions of sequences."""
    tokens = {
        name: {
            source.prefix: counts.num_rows * plan.seq_length for source, counts in count_split_rows(plan, rows, name)
        }
        for name in SPLIT_NAMES
    }
    split_tokens = {name: sum(by_prefix.values()) for name, by_prefix in tokens.items()}
    shufflings = ["each epoch shuffled by itself"] * len(tokens["train"])
    return split_tokens, _report_sources(plan.data.sources, tokens["train"], run_tokens, shufflings)


def _report_conversations(plan: RunPlan) -> ConversationReport | None:
    """The training data of a run with --sft."""
    if plan.rows is None:
        return None
    found = count_split_rows(plan, plan.rows, "train")
    num_rows = sum(counts.num_rows for _, counts in found)
    num_positions = sum(counts.num_positions for _, counts in found)
    return ConversationReport(
        rows=plan.rows.description,
        num_conversations=sum(counts.num_conversations for _, counts in found),
        num_sequences=num_rows,
        padding_share=1 - num_positions / (num_rows * plan.seq_length) if num_rows else 0.0,
        num_truncated=sum(counts.num_too_long for _, counts in found) if plan.rows.is_truncated else 0,
    )


def _report_sources(
    data_sets: DataPlan, tokens: dict[str, int], run_tokens: int, shufflings: Sequence[str]
) -> tuple[SourceReport, ...]:
    """Without weights megatron-core draws from each source in proportion to its size."""
    sources = data_sets.sources_of("train")
    weights = [tokens[source.prefix] if source.weight is None else source.weight for source in sources]
    total = sum(weights)
    return tuple(
        SourceReport(
            prefix=source.prefix,
            weight=weight / total if total else 0.0,
            num_tokens=tokens[source.prefix],
            epochs=run_tokens * weight / total / tokens[source.prefix] if total and tokens[source.prefix] else 0.0,
            shuffling=shuffling,
        )
        for source, weight, shuffling in itertools.zip_longest(sources, weights, shufflings)
    )
