"""What a dry run reports, as plain data: `dry_run.py` fills it in, `tables.py` prints it. Pure.

A part that a problem makes impossible (the stages of a model that cannot be split) is None; the problems say why.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """A flag of the command line that replaces a number of the preset."""

    name: str
    preset_value: Any
    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """Exact parameters of the whole model. padded: with the vocabulary rows added for tensor parallelism."""

    name: str
    num_layers: int
    hidden_size: int
    num_parameters: int
    num_parameters_padded: int
    num_active_parameters: int  # that one token is computed with
    vocab_size: int
    padded_vocab_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One pipeline stage: its layers by chunk, and what one of its ranks holds (exact) and needs (estimated)."""

    pp_rank: int
    layers: tuple[tuple[int, ...], ...]  # of each virtual chunk, numbered from 0 through the whole model
    dense_parameters: int
    expert_parameters: int
    optimizer_shard_parameters: int
    memory_bytes: dict[str, int] | None  # by part; their sum is memory_total_bytes
    memory_total_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GridAxis:
    """One axis of the rank grid: coordinate = rank // stride % size."""

    name: str
    size: int
    stride: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """One data set of the training blend. epochs: how often the run reads its training tokens."""

    prefix: str
    weight: float  # share of the run's tokens
    num_tokens: int
    epochs: float
    shuffling: str | None  # of its epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationReport:
    """An epoch of conversations. num_truncated: cut at their end."""

    rows: str  # how they become sequences
    num_conversations: int
    num_sequences: int
    padding_share: float
    num_truncated: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """Length of the run. split_tokens and epochs are None for mock data and for data that cannot be read.

    conversations: None in pretraining. With them, tokens of data are positions of sequences, padding included.
    """

    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    seq_length: int
    tokens_per_step: int
    num_steps: int
    num_tokens: int
    flops_per_token: int
    flop_convention: str
    total_flops: int
    data_flags: tuple[str, ...]  # which name the data; empty: none is named yet
    split_tokens: dict[str, int] | None
    epochs: float | None
    data_order: str | None  # and, where the run resumes, whether it is the checkpoint's
    sources: tuple[SourceReport, ...]
    conversations: ConversationReport | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a run would be. JSON-able by `to_json`."""

    preset: str | None
    platform: str
    backend: str
    precision: str
    world_size: int
    weights: str  # the source of the first ones
    overrides: tuple[Override, ...]
    settings: dict[str, Any]  # what differs from Megatron's own defaults
    model: ModelReport | None
    grid: tuple[GridAxis, ...] | None
    stages: tuple[StageReport, ...] | None
    available_bytes: int | None  # of memory, for one rank
    recompute: str
    run: RunReport | None
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
