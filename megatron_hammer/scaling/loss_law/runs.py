"""Runs for a loss law: from training's metrics.jsonl and validation.jsonl, or from a table.

A metrics.jsonl does not name its model, so a run is given as MODEL=PATH. The model is checked by the FLOPs per token,
which the file contains. The fields are those of training/metrics.py.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

from megatron_hammer.errors import ConfigError, DataError, HammerError
from megatron_hammer.files.csv_table import describe_other_length, list_repeated_columns, read_csv
from megatron_hammer.model.accounting import (
    FlopConvention,
    count_active_parameters,
    count_flops_per_token,
)
from megatron_hammer.model.parameters import embedding_tensors, head_tensors
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.presets.catalogue import PRESETS, select_preset
from megatron_hammer.scaling.loss_law.law import LossRun
from megatron_hammer.scaling.metrics_file import read_metrics

ParameterConvention = Literal["total", "non-embedding"]
LossKind = Literal["auto", "validation", "training"]

PARAMETER_CONVENTIONS: Final[dict[ParameterConvention, str]] = {
    "total": "with embeddings and head",
    "non-embedding": "without embeddings and head",
}
GROUPED_DIGITS: Final = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
TABLE_COLUMNS: Final = ("num_parameters", "num_tokens", "loss")
# A run whose final loss is above its lowest loss by more than this ratio, both smoothed, has diverged.
DIVERGENCE_RATIO: Final = 1.1
# A learning rate above this ratio of its maximum means that the schedule was cut off, and the loss is higher than it
# could be with these tokens. A cosine schedule that decays to a tenth passes.
UNDECAYED_LR_RATIO: Final = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How a run becomes a point of the law."""

    parameters: ParameterConvention = "total"
    flops: FlopConvention | None = None  # of LossRun.flops_per_token; None: not wanted
    loss: LossKind = "auto"
    validation_set: str | None = None  # None: the only one
    window_ratio: float = 0.05  # of a run's steps, at its end, whose training losses are averaged


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsRun:
    """The content of the files of one run."""

    name: str
    metrics_path: Path
    model: ModelShape | int  # int: a number of parameters
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


# --- training's files ------------------------------------------------------------------------------------------------


def read_metrics_runs(
    specs: Sequence[str], options: ReadOptions, read_hf_model: Callable[[Path], ModelShape]
) -> list[LossRun]:
    """The runs, each given as MODEL=PATH. Raises DataError with all problems of all runs at once."""
    found: list[MetricsRun] = []
    problems: list[str] = [
        f"runs: each must be given once, got {spec} twice. Remove one."
        for spec in dict.fromkeys(specs)
        if specs.count(spec) > 1
    ]
    for spec, name in zip(specs, name_runs(specs), strict=True):
        try:
            found.append(_read_metrics_run(spec, name, read_hf_model))
        except HammerError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    use_validation = _choose_loss(found, options)
    runs: list[LossRun] = []
    for run in found:
        try:
            runs.append(_build_point(run, options, use_validation=use_validation))
        except HammerError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return runs


def name_runs(specs: Sequence[str]) -> list[str]:
    """The name of each run's folder, or its whole path if two names are the same."""
    paths = [Path(spec.partition("=")[2] or spec) for spec in specs]
    folders = [path.parent if path.suffix == ".jsonl" else path for path in paths]
    names = [folder.name for folder in folders]
    return [
        name if name and names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]


def _read_metrics_run(spec: str, name: str, read_hf_model: Callable[[Path], ModelShape]) -> MetricsRun:
    model_text, separator, path_text = spec.partition("=")
    if not separator or not model_text or not path_text:
        raise ConfigError(
            f"runs: each must be MODEL=PATH, got {spec!r}. Write a preset, a Hugging Face folder or a number of "
            f"parameters before the path of metrics.jsonl or its folder."
        )
    path = Path(path_text)
    metrics_path = path / "metrics.jsonl" if path.is_dir() else path
    if not metrics_path.is_file():
        raise DataError(f"{path}: must be a metrics.jsonl or its folder, got no such file. Check --runs.")
    steps = read_metrics(metrics_path, "step", "loss")
    if not steps:
        raise DataError(f"{metrics_path}: must hold at least one step, got none. Leave it out of --runs.")
    validation_path = metrics_path.with_name("validation.jsonl")
    return MetricsRun(
        name=name,
        metrics_path=metrics_path,
        model=_read_model(model_text, read_hf_model),
        steps=steps,
        validations=read_metrics(validation_path, "step", "loss") if validation_path.is_file() else [],
    )


def _read_model(text: str, read_hf_model: Callable[[Path], ModelShape]) -> ModelShape | int:
    """A number of parameters, a folder or a preset. NAME@ROWS is the preset with a vocabulary of ROWS."""
    number = _parse_count(text)
    if number is not None:
        return number
    name, separator, rows = text.rpartition("@")
    vocab_size = _parse_count(rows) if separator else None
    if vocab_size is not None:
        text = name
    is_folder = text not in PRESETS and Path(text).exists()
    model = read_hf_model(Path(text)) if is_folder else select_preset(text).model
    return model if vocab_size is None else replace(model, vocab_size=vocab_size)


def _choose_loss(runs: Sequence[MetricsRun], options: ReadOptions) -> bool:
    """Whether the validation loss is used: if every run has one at its end, unless the options say otherwise."""
    if options.loss == "training":
        return False
    problems = []
    for run in runs:
        names = _list_final_sets(run)
        if options.validation_set is not None and options.validation_set not in names:
            problems.append(
                f"{run.metrics_path.with_name('validation.jsonl')}: must hold validation set {options.validation_set} "
                f"at the last step, {run.steps[-1]['step']}, got {', '.join(names) or 'none'}. "
                f"Pass another --validation-set or --loss training."
            )
        elif options.validation_set is None and len(names) > 1:
            problems.append(
                f"{run.metrics_path.with_name('validation.jsonl')}: must hold one validation set, got "
                f"{', '.join(names)}. Choose one with --validation-set."
            )
        elif not names and options.loss == "validation":
            problems.append(
                f"{run.metrics_path.with_name('validation.jsonl')}: must hold a loss at the last step, "
                f"{run.steps[-1]['step']}, got none. Evaluate at the end of training, or pass --loss training."
            )
    if problems:
        raise DataError(*problems)
    return all(_list_final_sets(run) for run in runs)


def _list_final_sets(run: MetricsRun) -> list[str]:
    """Validation sets that were evaluated after the run's last step."""
    last = run.steps[-1]["step"]
    names = (line.get("validation_set", "validation") for line in run.validations if line["step"] == last)
    return sorted(set(names) - {"test"})


def _build_point(run: MetricsRun, options: ReadOptions, *, use_validation: bool) -> LossRun:
    last = run.steps[-1]
    window_steps = max(1, math.ceil(options.window_ratio * len(run.steps)))
    training_loss = _find_final_loss(run, window_steps)
    if use_validation:
        name = options.validation_set or _list_final_sets(run)[0]
        (*_, line) = (
            line
            for line in run.validations
            if line["step"] == last["step"] and line.get("validation_set", "validation") == name
        )
        loss, source = float(line["loss"]), f"loss of {name} at step {last['step']}"
    else:
        loss, source = training_loss, f"mean training loss of the last {window_steps} of {len(run.steps)} steps"
    _check_model(run)
    model = run.model
    return LossRun(
        name=run.name,
        source=str(run.metrics_path),
        num_parameters=_count_run_size(model, options.parameters),
        num_tokens=int(last["num_tokens"]),
        loss=loss,
        loss_source=source,
        tokenizer=None if isinstance(model, int) else f"a vocabulary of {model.vocab_size:,}",
        flops_per_token=(
            None
            if isinstance(model, int) or options.flops is None
            else count_flops_per_token(model, _seq_length(last), options.flops)
        ),
        notes=tuple(_describe_schedule(run)),
    )


def count_size(model: ModelShape, convention: ParameterConvention) -> int:
    """N of a model. For a mixture of experts, the parameters that one token uses."""
    total = count_active_parameters(model)
    if convention == "total":
        return total
    ends = [*embedding_tensors(model, model.vocab_size), *head_tensors(model, model.vocab_size)]
    return total - sum(tensor.numel for tensor in ends if "embeddings" in tensor.name or "output_layer" in tensor.name)


def _count_run_size(model: ModelShape | int, convention: ParameterConvention) -> int:
    if isinstance(model, ModelShape):
        return count_size(model, convention)
    if convention == "total":
        return model
    raise ConfigError(
        f"parameters: must be total for a run that is named by a number, got {convention} for {model:,}. "
        f"Name a preset or a Hugging Face folder as MODEL."
    )


def _find_final_loss(run: MetricsRun, window_steps: int) -> float:
    """Mean training loss at the end. Raises DataError for a run that diverged."""
    losses = [float(step["loss"]) for step in run.steps]
    means = [math.fsum(losses[end - window_steps : end]) / window_steps for end in range(window_steps, len(losses) + 1)]
    # A step that was skipped has no finite loss. It is no divergence if the end is finite.
    final, lowest = means[-1], min((mean for mean in means if math.isfinite(mean)), default=math.inf)
    if not math.isfinite(final):
        raise DataError(
            f"{run.metrics_path}: run {run.name} must end with a finite loss, got {final} over its last {window_steps} "
            f"steps. It diverged: leave it out with --leave-out {run.name}."
        )
    if final > DIVERGENCE_RATIO * lowest:
        raise DataError(
            f"{run.metrics_path}: run {run.name} must end near its lowest loss, got {final:.4f} after {lowest:.4f}. "
            f"It diverged: leave it out with --leave-out {run.name}."
        )
    return final


def _check_model(run: MetricsRun) -> None:
    """Raise DataError if the run's FLOPs per token (convention A) are not those of its model."""
    model, last = run.model, run.steps[-1]
    if isinstance(model, int) or last.get("mfu_convention") != "A":
        return
    measured = round(last["model_tflops_per_gpu"] * 1e12 / last["tokens_per_s_per_gpu"])
    expected = count_flops_per_token(model, _seq_length(last), "A")
    # measured is a quotient of two floats of the file, so it is rounded.
    if abs(measured - expected) <= 1e-9 * expected:
        return
    # One more row of the output layer costs 6 h FLOPs per token. More layers can look the same, so this is only a hint.
    vocab_size, rest = divmod(measured - expected, 6 * model.hidden_size)
    vocab_size += model.vocab_size
    hint = f", or {model.name}@{vocab_size} if only the vocabulary differs" if rest == 0 and vocab_size > 0 else ""
    raise DataError(
        f"{run.metrics_path}: must be a run of {model.name}, got {measured:,} FLOPs per token where {model.name} with "
        f"a vocabulary of {model.vocab_size:,} has {expected:,}. Name the run's own model{hint}."
    )


def _seq_length(step: dict[str, Any]) -> int:
    return round(step["num_tokens"] / step["num_samples"])


def _describe_schedule(run: MetricsRun) -> list[str]:
    rates = [float(step["lr"]) for step in run.steps if step.get("lr") is not None]
    if not rates or rates[-1] <= UNDECAYED_LR_RATIO * max(rates):
        return []
    return [f"ended at {rates[-1] / max(rates):.0%} of its highest learning rate: its loss had further to fall"]


# --- a table ---------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[LossRun]:
    """The rows of a CSV with num_parameters, num_tokens, loss and, if known, run and tokenizer."""
    names, records = read_csv(path)
    problems = list_repeated_columns(path, names)
    if missing := [column for column in TABLE_COLUMNS if column not in names]:
        problems.append(
            f"{path}:1: must name the columns {', '.join(TABLE_COLUMNS)}, got no {', '.join(missing)}. Name them."
        )
    if problems:
        raise DataError(*problems)
    runs: list[LossRun] = []
    for line, cells in records:
        if len(cells) != len(names):
            problems.append(describe_other_length(f"{path}:{line}", len(cells), len(names)))
            continue
        row = dict(zip(names, map(str.strip, cells), strict=True))
        num_parameters, num_tokens, loss = (
            _parse_number(row[column], has_groups=column != "loss") for column in TABLE_COLUMNS
        )
        # A loss of nan stays, so that the fit can name the run that diverged.
        if loss is None or not (_is_finite(num_parameters) and _is_finite(num_tokens)):
            values = dict(zip(TABLE_COLUMNS, (num_parameters, num_tokens, loss), strict=True))
            problems += [
                f"{path}:{line}: {column} must be a number, got {row[column]!r}. Correct it or remove the row."
                for column, value in values.items()
                if value is None or (column != "loss" and not _is_finite(value))
            ]
            continue
        runs.append(
            LossRun(
                name=row.get("run") or f"line-{line}",
                source=f"{path}:{line}",
                num_parameters=round(num_parameters),
                num_tokens=round(num_tokens),
                loss=loss,
                loss_source=f"column loss of {path.name}",
                tokenizer=row.get("tokenizer") or None,
            )
        )
    if problems:
        raise DataError(*problems)
    return runs


def leave_out[T](runs: Sequence[T], names: Sequence[str], left_out: Sequence[str]) -> list[T]:
    """`runs`, whose names are `names`, without those in `left_out`. Raises ConfigError for an unknown name."""
    unknown = [name for name in left_out if name not in names]
    if unknown:
        raise ConfigError(
            f"leave-out: must name given runs, got {', '.join(unknown)}. The runs are {', '.join(names)}."
        )
    return [run for run, name in zip(runs, names, strict=True) if name not in left_out]


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _parse_number(text: str, *, has_groups: bool = True) -> float | None:
    """has_groups: commas between groups of three digits are allowed. Any other comma may be a decimal point."""
    if has_groups and GROUPED_DIGITS.fullmatch(text):
        text = text.replace(",", "")
    try:
        return float(text)
    except ValueError:
        return None


def _parse_count(text: str) -> int | None:
    """1e9, 1_000_000 or 1,000,000 as a count. None if it is not a number."""
    number = _parse_number(text)
    return round(number) if number is not None and math.isfinite(number) and number >= 1 else None
