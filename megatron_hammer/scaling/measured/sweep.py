"""The settings of a measured sweep: models x layouts x sizes x batches, each one short training run.

A sweep comes from flags or from a TOML file of [[sweep]] tables with the same names. `measure.py` runs the settings.
"""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.accounting import ParallelLayout
from megatron_hammer.presets.catalogue import select_preset
from megatron_hammer.presets.preset import Preset
from megatron_hammer.scaling.launch.training_flags import (
    list_batch_flags,
    list_layout_flags,
    list_model_flags,
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
# Megatron's flags that say what a run reads; without one of them a run reads tokens that are made up.
DATA_FLAGS = ("--data-path", "--data-args-path", "--per-split-data-args-path", "--train-data-path", "--mock-data")
TRAINED_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What to vary; empty sizes stand for the recipe's own. Every combination is one setting."""

    presets: tuple[str, ...]
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
        """Unique within a sweep whose runs differ in nothing but what is swept: hammer-tiny_tp2-pp2_s256_mb2_gb8."""
        name = f"{self.preset.name}_{self.layout_name}_s{self.seq_length}_mb{self.micro_batch_size}"
        name += f"_gb{self.global_batch_size}"
        return name if self.recompute == "none" else f"{name}_{self.recompute}"

    def list_flags(self) -> list[str]:
        """Flags of megatron_hammer.training.pretrain but for platform and outputs."""
        flags = [*list_model_flags(self.preset.model), *list_layout_flags(self.preset.model, self.layout)]
        flags += list_batch_flags(
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            seq_length=self.seq_length,
        )
        flags += [*list_recompute_flags(self.recompute), "--precision", self.precision]
        flags += ["--train-iters", str(self.steps), "--lr-warmup-iters", "0", "--eval-iters", "0"]
        has_data = any(word.split("=")[0] in DATA_FLAGS for word in self.flags)
        return [*flags, *self.flags] if has_data else [*flags, *self.flags, "--mock-data"]


def digest_of(content: Any) -> str:
    """Eight hexadecimal digits that change with anything in a JSON-able object."""
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
    """Every combination, in the order in which they are given. Raises ConfigError with every problem found."""
    problems = _find_problems(sweep)
    settings = []
    for preset_name, layout_name in itertools.product(sweep.presets, sweep.layouts):
        try:
            preset, layout = select_preset(preset_name), parse_layout(layout_name)
            list_layout_flags(preset.model, layout)
        except ConfigError as error:
            problems += error.problems
            continue
        settings += [] if problems else _combine(sweep, preset, layout_name, layout)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return settings


def _find_problems(sweep: Sweep) -> list[str]:
    problems = []
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


def read_sweeps(path: Path) -> list[Sweep]:
    """The [[sweep]] tables of a TOML file. Raises ConfigError for a file or a field that is none."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: must be a TOML file of [[sweep]] tables, got {error}. Check the file.") from None
    sweeps = tables.pop("sweep", None)
    if tables or not isinstance(sweeps, list) or not sweeps:
        raise ConfigError(
            f"{path}: must hold [[sweep]] tables and nothing else, got {', '.join(tables) or 'none of them'}. "
            "Write [[sweep]] above each group of settings."
        )
    return [_build_sweep(path, number, table) for number, table in enumerate(sweeps, 1)]


def _build_sweep(path: Path, number: int, table: dict[str, Any]) -> Sweep:
    known = [field.name for field in fields(Sweep)]
    problems = [
        f"{path}: sweep {number}: must have fields of {', '.join(known)}, got {name}. Drop it, or correct its name."
        for name in table
        if name not in known
    ]
    if not table.get("presets"):
        problems.append(f"{path}: sweep {number}: presets: must name one at least, got none. Add presets = [...].")
    default = Sweep(presets=())
    for name, value in table.items():
        kind = type(getattr(default, name, ())) if name != "precision" else str
        is_list = kind is tuple
        words = value if is_list and isinstance(value, list) else [value]
        wanted = int if name.endswith(("sizes", "lengths", "rank", "steps")) else str
        if (is_list and not isinstance(value, list)) or not all(type(word) is wanted for word in words):
            shape = f"a list of {wanted.__name__}" if is_list else wanted.__name__
            problems.append(f"{path}: sweep {number}: {name}: must be {shape}, got {value!r}. Correct it.")
    if problems:
        raise ConfigError(*problems)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    return replace(default, **values)
