"""The settings of a measured sweep: models x layouts x sizes x batches, each one short training run.

A sweep is given by flags, or by a TOML file of [[sweep]] tables with the same names. `run_sweep.py` runs the settings.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from annotated_types import MinLen

from megatron_hammer.errors import ConfigError
from megatron_hammer.files.typed import read_toml
from megatron_hammer.model.accounting import (
    ParallelLayout,
    find_grid_problems,
    find_shard_problems,
    find_split_problems,
)
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.presets.preset import Preset
from megatron_hammer.scaling.launch.training_flags import (
    list_batch_flags,
    list_layout_flags,
    list_recompute_flags,
)
from megatron_hammer.scaling.plan import Precision, Recompute

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
    "ep": "expert_model_parallel_size",
}
# Megatron's flags that say what a run reads. Without any of them a run reads generated tokens (--mock-data).
DATA_FLAGS = ("--data-path", "--data-args-path", "--per-split-data-args-path", "--train-data-path", "--mock-data")
# Training flags that change what a layout must divide.
SIZE_FLAGS = (
    r"--(num-|hidden-size|ffn-|kv-channels|group-query|moe-|vocab-|decoder-|account-|tensor-|pipeline-|expert-)"
)
TRAINED_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What to vary. Empty sizes mean the recipe's own. Every combination is one setting."""

    presets: Annotated[tuple[str, ...], MinLen(1)]
    layouts: tuple[str, ...] = ("single",)
    micro_batch_sizes: tuple[int, ...] = ()
    global_batch_sizes: tuple[int, ...] = ()
    samples_per_rank: tuple[int, ...] = ()  # global batch = this x processes (weak scaling)
    seq_lengths: tuple[int, ...] = ()
    recompute: tuple[str, ...] = ("none",)
    precision: str | None = None  # the recipe's
    steps: int = 20
    flags: tuple[str, ...] = ()  # further training flags, of every run


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One run to be measured."""

    preset: Preset
    layout_name: str
    layout: ParallelLayout
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    recompute: Recompute
    precision: Precision
    steps: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique within a sweep that varies only these sizes: hammer-tiny_tp2-pp2_s256_mb2_gb8."""
        name = f"{self.preset.name}_{self.layout_name}_s{self.seq_length}_mb{self.micro_batch_size}"
        name += f"_gb{self.global_batch_size}"
        return name if self.recompute == "none" else f"{name}_{self.recompute}"

    def list_flags(self) -> list[str]:
        """Flags of megatron_hammer.training.pretrain, except platform and outputs."""
        flags = ["--preset", self.preset.name, *list_layout_flags(self.preset.model, self.layout)]
        flags += list_batch_flags(
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            seq_length=self.seq_length,
        )
        flags += [*list_recompute_flags(self.recompute), "--precision", self.precision]
        # megatron.core.optimizer_param_scheduler refuses a warm-up as long as the decay. A recipe's can be.
        flags += ["--train-iters", str(self.steps), "--lr-warmup-iters", "0", "--eval-iters", "0"]
        has_data = any(word.split("=")[0] in DATA_FLAGS for word in self.flags)
        return [*flags, *self.flags] if has_data else [*flags, *self.flags, "--mock-data"]


def digest_of(content: Any) -> str:
    """Eight hexadecimal digits that change if anything in an object of plain types changes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def parse_layout(name: str) -> ParallelLayout:
    """`single`, or sizes and switches joined by hyphens: tp2-sp-pp2-vp2-cp2-dp2-ep2, ddp for no distributed optimizer.

    Raises ConfigError for anything else.
    """
    values: dict[str, Any] = {}
    for word in name.split("-"):
        match = re.fullmatch(r"(tp|pp|vp|cp|dp|ep)([1-9]\d*)", word)
        key = (
            SIZES[match[1]] if match else {"sp": "has_sequence_parallel", "ddp": "has_distributed_optimizer"}.get(word)
        )
        is_single = word == name == "single"
        if (key is None and not is_single) or key in values:
            raise ConfigError(
                f"layouts: must be single or of tpN, sp, ppN, vpN, cpN, dpN, epN and ddp, each once, got {name}. "
                "Write tp2-pp2, say."
            )
        if key is not None:
            values[key] = int(match[2]) if match else word == "sp"
    return ParallelLayout(**values)


def list_settings(sweep: Sweep) -> list[Setting]:
    """Every combination, in the given order. Raises ConfigError with every problem found."""
    problems = _find_problems(sweep)
    settings = []
    for preset_name, layout_name in itertools.product(sweep.presets, sweep.layouts):
        try:
            preset, layout = select_preset(preset_name), parse_layout(layout_name)
            list_layout_flags(preset.model, layout)
            problems += _find_layout_problems(sweep, preset, layout_name, layout)
        except ConfigError as error:
            problems += error.problems
            continue
        settings += [] if problems else _combine(sweep, preset, layout_name, layout)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return settings


def _find_layout_problems(sweep: Sweep, preset: Preset, layout_name: str, layout: ParallelLayout) -> list[str]:
    """Why the model cannot be cut so. Otherwise every process of the run would start before it says so."""
    if any(re.match(SIZE_FLAGS, flag) for flag in sweep.flags):
        return []  # they have the last word
    model = preset.model
    problems = find_grid_problems(layout) or (
        *find_shard_problems(model, layout),
        *find_split_problems(model.num_layers, layout),
    )
    return [f"layouts: {layout_name} of {preset.name}: {problem}" for problem in problems]


def _find_problems(sweep: Sweep) -> list[str]:
    # Without any of these there is no setting, and a sweep of nothing would look finished.
    problems = [
        f"{name}: must name one at least, got none. Pass --{name} {example}."
        for name, example in (("presets", "hammer-tiny"), ("layouts", "single"), ("recompute", "none"))
        if not getattr(sweep, name)
    ]
    for name in ("micro_batch_sizes", "global_batch_sizes", "samples_per_rank", "seq_lengths"):
        problems += [
            f"{name.replace('_', '-')}: must be at least 1, got {size}. Pass positive sizes."
            for size in getattr(sweep, name)
            if size < 1
        ]
    if sweep.global_batch_sizes and sweep.samples_per_rank:
        problems.append(
            f"samples-per-rank: cannot be combined with global-batch-sizes, got {_join(sweep.samples_per_rank)} and "
            f"{_join(sweep.global_batch_sizes)}. Give one of them."
        )
    for name, allowed in (("recompute", get_args(Recompute)), ("precision", TRAINED_PRECISIONS)):
        value = getattr(sweep, name)
        for choice in value if name == "recompute" else (value,):
            if choice is not None and choice not in allowed:
                problems.append(f"{name}: must be one of {', '.join(allowed)}, got {choice}. Choose one of them.")
    return problems


def _join(sizes: Sequence[int]) -> str:
    return ", ".join(str(size) for size in sizes)


def _combine(sweep: Sweep, preset: Preset, layout_name: str, layout: ParallelLayout) -> list[Setting]:
    """The sizes of one model under one layout."""
    recipe = preset.recipe
    batches = sweep.global_batch_sizes or (recipe.global_batch_size,)
    if sweep.samples_per_rank:
        batches = tuple(samples * layout.world_size for samples in sweep.samples_per_rank)
    sizes = itertools.product(
        sweep.seq_lengths or (recipe.seq_length,),
        sweep.micro_batch_sizes or (recipe.micro_batch_size,),
        batches,
        sweep.recompute,
    )
    return [
        Setting(
            preset=preset,
            layout_name=layout_name,
            layout=layout,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            recompute=cast(Recompute, recompute),
            precision=cast(Precision, sweep.precision or recipe.precision),
            steps=sweep.steps,
            flags=sweep.flags,
        )
        for seq_length, micro_batch_size, global_batch_size, recompute in sizes
    ]


@dataclass(frozen=True, slots=True)
class _SweepFile:
    sweep: tuple[Sweep, ...]


def read_sweeps(path: Path) -> list[Sweep]:
    """The [[sweep]] tables of a TOML file. Raises ConfigError with every field that cannot be used."""
    known = ", ".join(field.name for field in fields(Sweep))
    remedy = f"Write [[sweep]] tables with the fields {known}."
    sweeps = read_toml(path, _SweepFile, remedy=remedy, raises=ConfigError, allows_unknown=False).sweep
    if not sweeps:
        raise ConfigError(f"{path}: sweep must hold a table, got none. {remedy}")
    return list(sweeps)
