"""What the software of a source does with memory where a row of a table is blank: the facts are in software.toml.

The first entry whose pattern matches the row's source is taken. `measured_memory.py` applies it, and names every fact
that it used.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml
from megatron_hammer.model.memory.options import WORKSPACE_BYTES, CrossEntropy, RecomputeModule
from megatron_hammer.scaling.plan import Precision, Recompute, Sharding, Text

SOFTWARE_PATH = Path(__file__).parent / "software.toml"
# What a source calls its peak: the peak of torch's allocator, or what the allocator took from the driver. nvidia-smi
# shows the latter, with the CUDA context on top of it.
PeakKind = Literal["allocated", "reserved"]
StageChoice = Literal["heaviest", "first", "last"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySoftware:
    """Facts about one source's software: defaults for blank cells, and what the table has no column for."""

    name: str
    source_pattern: str = ""  # searched in the row's source, lower case
    source: Text
    peak: PeakKind = "allocated"
    stage: StageChoice = "heaviest"
    state: Literal["state", "layer_state"] = "state"  # what its figures of weights and optimizer count
    seq_length: int | None = None
    micro_batch_size: int | None = None
    vocab_size: int | None = None  # overrides what the model's name says; not a cell of the row
    data_parallel_size: int | None = None
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    selective_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # what "selective" means there
    sharding: Sharding = "distributed_optimizer"
    has_sequence_parallel: bool = True  # where tp > 1 and the cell is blank
    has_dropout: bool = False
    has_flash_attention: bool = True
    shard_size: int | None = None
    reshards_in_pipeline: bool = True
    has_fused_activation: bool = True
    has_fused_weight_gradients: bool = True
    has_quantized_parameters: bool = False
    keeps_quantized: bool = True  # False: 8-bit copies are made again each time they are needed, and never kept
    is_context_parallel_all_to_all: bool = False
    cross_entropy: CrossEntropy = "unfused"
    gradient_bytes: int = 4
    master_bytes: int = 4
    has_expandable_segments: bool = False  # PYTORCH_CUDA_ALLOC_CONF of its launch script
    cuts_local_batch: bool = False  # a row's micro-batch is cut into as many as the pipeline has stages
    workspace_bytes: int = WORKSPACE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class NameRule:
    """What a word in a row's model name or quantity says about its run."""

    pattern: str
    source_pattern: str
    says: str
    changes: Mapping[str, Any]  # of ModelShape, MemorySoftware or ParallelLayout, by field name


@dataclass(frozen=True, slots=True)
class KnownMemorySoftware:
    """The content of software.toml, in its order."""

    software: tuple[MemorySoftware, ...]
    unknown: MemorySoftware
    name_rule: tuple[NameRule, ...]


@functools.cache
def load_known_memory_software() -> KnownMemorySoftware:
    return read_toml(
        SOFTWARE_PATH, KnownMemorySoftware, remedy="Correct it there.", raises=ConfigError, allows_unknown=False
    )


def select_memory_software(source: str) -> MemorySoftware:
    """The facts about a source, or Megatron's defaults for an unknown source."""
    known = load_known_memory_software()
    return next((one for one in known.software if re.search(one.source_pattern, source.lower())), known.unknown)
