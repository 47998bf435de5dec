"""Prints an inspected checkpoint or a comparison: as tables, or as dictionaries for JSON."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hammer.checkpoint.inspection.comparison import Comparison, TensorDifference
from megatron_hammer.checkpoint.inspection.inspect_checkpoint import CheckpointDescription, TensorEntry
from megatron_hammer.checkpoint.inspection.tensor_statistics import TensorStatistics
from megatron_hammer.files.tables import build_pairs, build_table

MAX_LISTED = 60  # of differences, in tables; JSON has all
# Embeddings, in Megatron's and Hugging Face's names.
_FIRST = ("embedding.", "model.embed_tokens.", "transformer.wte.", "transformer.wpe.", "wte.", "wpe.")
_MOMENT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.\w+\.")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def print_description(found: CheckpointDescription, console: Console) -> None:
    """Several small tables: progress of training, layout, optimizer, recipe, architecture, tensors."""
    console.print(_pairs("checkpoint", _identity(found)), "")
    for title, values in (
        ("saved with", found.layout),
        ("optimizer", found.optimizer),
        ("recipe", found.recipe),
        ("architecture", found.architecture),
    ):
        if values:
            console.print(_pairs(title, values), "")
    console.print(_tensor_table(found.tensors), "")
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _identity(found: CheckpointDescription) -> dict[str, Any]:
    iterations = ", ".join(map(str, found.iterations))
    padding = found.num_padding_parameters
    values = {
        "directory": found.directory,
        "format": found.format,
        "iteration": found.iteration,
        "iterations here": iterations if len(found.iterations) > 1 else None,
        "samples": found.consumed_samples,
        "tokens": found.consumed_tokens,
        "parameters": found.num_parameters,
        "with vocabulary padding": found.num_parameters + padding if padding else None,
        "bytes of tensors": found.num_bytes,
        "other entries": _count_objects(found.objects),
    }
    return {name: value for name, value in values.items() if value is not None}


def _count_objects(objects: Sequence[str]) -> str | None:
    """Random states and the like by kind, with how many of each."""
    kinds: dict[str, int] = {}
    for key in objects:
        # Keys end in the shard's number (rng_state/shard_0_1): with a line for each the table would be very long.
        kind = "_extra_state" if "_extra_state" in key else key.split("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or None


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    return build_pairs(title, {name: _text(value) for name, value in values.items()})


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {_text(part)}" for name, part in dataclasses.asdict(value).items())
    # bool is an int in Python, and True would be printed as 1.
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _tensor_table(entries: Sequence[TensorEntry]) -> Table:
    rows = []
    for name, group in group_alike(entries):
        first = group[0]
        chunks = [entry.num_chunks for entry in group if entry.num_chunks is not None]
        rows.append(
            (
                name,
                f"{len(group):,}",
                # A group of the optimizer's tensors mixes shapes.
                str(first.shape) if all(entry.shape == first.shape for entry in group) else "",
                first.dtype,
                f"{sum(entry.num_elements for entry in group):,}",
                f"{sum(entry.num_bytes for entry in group):,}",
                f"{sum(chunks):,}" if chunks else "",
            )
        )
    return build_table("tensors", ("name", "times", "shape", "dtype", "elements", "bytes", "chunks"), rows)


def group_alike(entries: Sequence[TensorEntry]) -> Iterator[tuple[str, list[TensorEntry]]]:
    """Tensors that differ in numbers of layers and experts only, as one name with * for the numbers; after the model's
    the optimizer's, one name for each of its moments.
    """
    groups: dict[tuple[Any, ...], list[TensorEntry]] = {}
    for entry in sorted(entries, key=_place):
        if entry.part == "optimizer":
            moment = _MOMENT.match(entry.name)
            # One name for each moment: its parameters are those of the model, which are listed already.
            key: tuple[Any, ...] = (moment[0] + "*" if moment else entry.name, entry.dtype)
        else:
            key = (_INDEX.sub("*", entry.name), entry.shape, entry.dtype)
        groups.setdefault(key, []).append(entry)
    for (name, *_), group in groups.items():
        yield (name if len(group) > 1 else group[0].name), group


def _place(entry: TensorEntry) -> tuple[bool, int]:
    """The model's before the optimizer's; embeddings, layers, and what follows them."""
    is_embedding = entry.name.startswith(_FIRST)
    return entry.part == "optimizer", 0 if is_embedding else 1 if "layers." in entry.name or ".h." in entry.name else 2


def summarise_description(found: CheckpointDescription) -> str:
    parts = [f"{found.num_parameters:,} parameters", f"{len(found.tensors):,} tensors", f"{found.num_bytes:,} bytes"]
    if found.iteration is not None:
        parts.insert(0, f"iteration {found.iteration:,}")
    if found.consumed_tokens is not None:
        parts.insert(1, f"{found.consumed_tokens:,} tokens")
    return f"{found.directory}: {found.format}, {', '.join(parts)}"


def description_to_json(found: CheckpointDescription) -> dict[str, Any]:
    return _plain(dataclasses.asdict(found))


# --- statistics ------------------------------------------------------------------------------------------------------


def print_statistics(measured: Mapping[str, TensorStatistics], console: Console) -> None:
    """One row per tensor: statistics of its finite elements, and how many are not finite; those rows stand out."""
    rows = []
    for name, found in measured.items():
        numbers = (f"{value:.4g}" for value in (found.min, found.max, found.mean, found.std))
        counts = (f"{count:,}" for count in (found.num_nan, found.num_infinite, found.num_zero))
        rows.append((name, f"{found.num_elements:,}", *numbers, *counts))
    columns = ("name", "elements", "min", "max", "mean", "std", "NaN", "infinite", "zero")
    table = build_table("statistics of the finite elements", columns, rows)
    for row, found in zip(table.rows, measured.values(), strict=True):
        row.style = "bold red" if found.num_nan or found.num_infinite else None
    console.print(table, "")


def summarise_statistics(measured: Mapping[str, TensorStatistics]) -> str:
    broken = [name for name, found in measured.items() if found.num_nan or found.num_infinite]
    elements = sum(found.num_elements for found in measured.values())
    which = f" ({', '.join(broken[:5])}{', ...' if len(broken) > 5 else ''})" if broken else ""
    return f"{len(measured):,} tensors measured, {elements:,} elements, {len(broken)} with NaN or infinity{which}"


def statistics_to_json(measured: Mapping[str, TensorStatistics]) -> dict[str, Any]:
    return {name: _plain(dataclasses.asdict(found)) for name, found in measured.items()}


# --- comparison ------------------------------------------------------------------------------------------------------


def print_comparison(found: Comparison, console: Console) -> None:
    """Differing arguments, then differing tensors; where there are very many, the first ones."""
    if found.arguments:
        rows = [(argument.name, argument.first, argument.second) for argument in found.arguments]
        console.print(build_table("differing arguments", ("argument", "first", "second"), rows, num_text=3), "")
    if not found.differences:
        return
    columns = ("name", "what", "first", "second", "max |difference|", "different elements")
    cells = map(_difference_cells, found.differences[:MAX_LISTED])
    console.print(build_table("differing tensors", columns, cells, num_text=2), "")
    if len(found.differences) > MAX_LISTED:
        console.print(f"and {len(found.differences) - MAX_LISTED:,} more; --json lists all", highlight=False)


def _difference_cells(difference: TensorDifference) -> tuple[str, ...]:
    largest = "" if difference.max_difference is None else f"{difference.max_difference:.6g}"
    count = "" if difference.num_different is None else f"{difference.num_different:,} of {difference.num_elements:,}"
    return (
        difference.name,
        difference.kind,
        difference.first or "absent",
        difference.second or "absent",
        largest,
        count,
    )


def summarise_comparison(found: Comparison) -> str:
    """The line that says whether the two are equal, and if not, in how many tensors of which kind they differ."""
    counts = {kind: 0 for kind in ("missing", "unexpected", "shape", "dtype", "value")}
    for difference in found.differences:
        counts[difference.kind] += 1
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    verdict = "equal" if found.is_equal else f"different: {kinds}"
    return (
        f"{verdict}; {found.num_equal:,} of {found.num_equal + len(found.differences):,} tensors equal, "
        f"{len(found.arguments):,} arguments differ: {found.first} and {found.second}"
    )


def comparison_to_json(found: Comparison) -> dict[str, Any]:
    return _plain({**dataclasses.asdict(found), "is_equal": found.is_equal})


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists, and numbers that JSON does not have as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
