"""What each published source does not say about its software and machines: the facts are in software.toml.

The software is selected by the row's `source`, or by its era where no pattern matches. A recipe fills in a layout that
the table left blank, from the recipe that the source ran.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml
from megatron_hammer.model.accounting import FlopConvention
from megatron_hammer.model.memory.options import RecomputeModule
from megatron_hammer.scaling.plan import TODAY, ContextExchange, Dispatcher, Precision, Recompute, Sharding, Text
from megatron_hammer.scaling.published.run_table import RunRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSoftware:
    """Facts about one source's software: defaults for blank cells, and what the table has no column for.

    source_pattern: a regular expression that is searched in the row's source, in lower case.
    """

    name: str
    source_pattern: str = ""
    source: Text
    year: float | None = None  # of its release
    is_dated_by_version: bool = False  # the source names its release, as NVIDIA numbers them: "25.09"
    is_megatron_style: bool = True
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    sharding: Sharding = "distributed_optimizer"
    has_flash_attention: bool = True
    has_sequence_parallel: bool = True  # where tp > 1
    recomputes_without_sequence_parallel: bool = False  # its runs with full recomputation have no sequence parallelism
    overlaps_data_parallel: bool = True
    gathers_parameters_alone: bool = False  # although gradients are reduced beside the backward pass
    overlaps_tensor_parallel: bool = True
    context_exchange: ContextExchange = "p2p"
    gradient_bytes: int = 4
    # Formats in which it trains without 16-bit weights of the linears. Block scaling in software is never one.
    quantized_parameters: tuple[Precision, ...] = ()
    keeps_quantized_copies: bool = True  # else 16-bit weights and inputs are quantized for each product, and kept so
    selective_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # what "selective" means there
    # How it counts FLOPs if mfu_definition is blank. "hardware": B, plus the layers' forward pass if it is recomputed.
    flop_convention: FlopConvention | Literal["hardware"] = "B"
    seq_length: int | None = None
    is_interleaved: bool = False  # a blank vpp means one chunk per layer: "set to maximum" in NeMo's recipes
    dispatcher: Dispatcher = "alltoall"
    expert_tensor_parallel_size: int | None = None  # None: tp, Megatron's default
    accumulates_gradients: bool = True  # False: a blank micro_batch is global_batch / dp
    cluster_of_gpu: Mapping[str, str] = field(default_factory=dict)  # if it is not the GPU's default cluster
    gpu_of_gpu: Mapping[str, str] = field(default_factory=dict)  # which variant the name of the GPU meant at that time


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecipe:
    """A layout that a source ran and its table left out. Cells of the row take precedence."""

    source_pattern: str
    model_pattern: str
    gpu: str  # name in gpus.toml
    source: str
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    vpp: int | None = None
    micro_batch: int | None = None
    samples_per_gpu: float | None = None  # of the global batch
    seq: int | None = None
    recompute: Recompute | None = None
    gradient_bytes: int | None = None
    dispatcher: Dispatcher | None = None
    overlap_ep: bool | None = None
    master_bytes: int | None = None
    moments_bytes: int | None = None
    num_offloaded_layers: int | None = None
    precision_pattern: str = ""  # searched in the row's precision, lower case


SOFTWARE_PATH = Path(__file__).parent / "software.toml"
# The software of an unknown source that ran in fp16 with full recomputation on an A100 or an older GPU.
OLD_MEGATRON = "Megatron-LM of 2021"


@dataclass(frozen=True, slots=True)
class KnownSoftware:
    """The content of software.toml, in its order."""

    software: tuple[TrainingSoftware, ...]
    recipe: tuple[SourceRecipe, ...]
    unknown: TrainingSoftware
    cpu: TrainingSoftware


@functools.cache
def load_known_software() -> KnownSoftware:
    return read_toml(SOFTWARE_PATH, KnownSoftware, remedy="Correct it there.", raises=ConfigError, allows_unknown=False)


def select_software(row: RunRow, gpu_name: str) -> tuple[TrainingSoftware, tuple[str, ...]]:
    """The software of a row's source, or of its era if the source is unknown, and the assumption that this makes."""
    known = load_known_software()
    source = row.source.lower()
    for software in known.software:
        if source and re.search(software.source_pattern, source):
            return software, (f"software of {software.name}: {software.source}",)
    if gpu_name == "cpu-core":
        return known.cpu, (f"software: {known.cpu.source}",)
    if _is_old(row, gpu_name):
        reason = f"a {gpu_name} in fp16 or an unnamed precision with full recomputation is taken as {OLD_MEGATRON}"
        return next(one for one in known.software if one.name == OLD_MEGATRON), (f"software: {reason}",)
    return known.unknown, (f"software: {known.unknown.source}",)


def find_software_year(row: RunRow, software: TrainingSoftware) -> float:
    """When the software of a row was released: by the version in its source, else as known; today if unknown."""
    version = re.search(r"(?<![\d.])(2[3-9])\.(0[1-9]|1[0-2])(?!\d)", row.source)
    if version is not None and software.is_dated_by_version:
        return 2000 + int(version[1]) + int(version[2]) / 12
    return TODAY if software.year is None else software.year


def select_recipe(row: RunRow, gpu_name: str) -> SourceRecipe | None:
    """The recipe that a row's source ran, or None if none is known."""
    source, model = row.source.lower(), row.model.lower()
    for recipe in load_known_software().recipe:
        is_same_run = re.search(recipe.source_pattern, source) and re.search(recipe.model_pattern, model)
        if is_same_run and recipe.gpu == gpu_name and re.search(recipe.precision_pattern, row.precision.lower()):
            return recipe
    return None


def _is_old(row: RunRow, gpu_name: str) -> bool:
    is_half = "fp16" in row.precision.lower() or not row.precision.strip()
    return gpu_name.startswith(("v100", "a100")) and is_half and "full" in row.recompute.lower()
