"""Fingerprints of what a run computes: of every batch, gradient and weight, on every rank, for finding the first bit
that differs between two runs. `tools/compare_runs.py --bit-exact` reads them; this file imports no torch.

A folder beside metrics.jsonl has one file a rank, with one JSON object a step:
{"step", "batch": {name: CRC-32}, "gradients": {...}, "weights": {...}}, the weights as the step leaves them.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hammer.errors import DataError
from megatron_hammer.files.typed import read_json_lines
from megatron_hammer.training.metrics import drop_lines_from

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "fingerprints"
KINDS = ("batch", "gradients", "weights")  # in the order in which a step makes them
NAMES_SHOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFingerprint:
    """One line of a file: CRC-32 by name of the tensor."""

    step: int
    batch: dict[str, int]
    gradients: dict[str, int]
    weights: dict[str, int]


class FingerprintFile:
    """What one rank writes. interval: every so many steps."""

    def __init__(self, folder: Path, rank: int, interval: int):
        self._path, self._interval = find_file(folder, rank), interval
        self._step = 0
        self._found: dict[str, dict[str, int]] = {}
        self._num_batches = 0

    def begin_step(self, step: int) -> None:
        """step: counted from 1."""
        if self._step == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            drop_lines_from(self._path, step)  # of steps that run again
        self._step = step
        self._found = {kind: {} for kind in KINDS}
        self._num_batches = 0

    def add_batch(self, batch: Mapping[str, "Tensor | None"]) -> None:
        """A micro-batch as this rank's part of the model gets it."""
        if self._is_due:
            for name, tensor in batch.items():
                if tensor is not None:
                    self._found["batch"][f"{self._num_batches}.{name}"] = hash_tensor(tensor)
            self._num_batches += 1

    def add_gradients(self, model: Sequence[Any]) -> None:
        """model: Megatron's chunks, after the backward pass."""
        if self._is_due:
            for name, parameter in list_parameters(model):
                # A gradient that other ranks reduce is this rank's own there, which is as reproducible.
                gradient = getattr(parameter, "main_grad", parameter.grad)
                if gradient is not None:
                    self._found["gradients"][name] = hash_tensor(gradient)

    def end_step(self, model: Sequence[Any]) -> None:
        """The optimizer has stepped."""
        if self._is_due:
            self._found["weights"] = {name: hash_tensor(parameter) for name, parameter in list_parameters(model)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self._step, **self._found}) + "\n")

    @property
    def _is_due(self) -> bool:
        return self._step % self._interval == 0


def find_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.jsonl"


def list_parameters(model: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of every chunk; names of several chunks begin with the chunk's number."""
    for number, chunk in enumerate(model):
        for name, parameter in chunk.named_parameters():
            inner = name.removeprefix("module.").removeprefix("module.")
            yield (inner if len(model) == 1 else f"chunk {number}: {inner}"), parameter


def hash_tensor(tensor: "Tensor") -> int:
    """CRC-32 of a tensor's bytes."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.cpu().numpy())


def read_file(path: Path) -> list[StepFingerprint]:
    """Every line; one that a kill cut off at the end is left out. Raises DataError with path and line."""
    return read_json_lines(path, StepFingerprint, remedy="Run again with --fingerprint-interval 1.")


def read_run(folder: Path) -> dict[int, dict[int, StepFingerprint]]:
    """The steps of every rank, by rank and step. Raises DataError if there are none."""
    paths = sorted(folder.glob("rank-*.jsonl")) if folder.is_dir() else []
    if not paths:
        raise DataError(
            f"{folder}: must hold the fingerprints of a run, got none. Run it with --fingerprint-interval 1."
        )
    return {int(path.stem.removeprefix("rank-")): {line.step: line for line in read_file(path)} for path in paths}


def find_first_difference(
    run: Mapping[int, Mapping[int, StepFingerprint]], reference: Mapping[int, Mapping[int, StepFingerprint]]
) -> str | None:
    """Where `run` first differs from `reference`, as words after its name; None where both are equal bit for bit."""
    if run.keys() != reference.keys():
        return f"has {len(run)} ranks instead of {len(reference)}"
    steps = sorted({step for of_rank in (*run.values(), *reference.values()) for step in of_rank})
    for step in steps:
        absent = [rank for rank in sorted(run) if step not in run[rank] or step not in reference[rank]]
        if absent:
            return f"has no fingerprints to compare at step {step} of rank {absent[0]}"
        for kind in KINDS:
            different = {rank: _compare(run[rank][step], reference[rank][step], kind) for rank in sorted(run)}
            ranks = [rank for rank, names in different.items() if names]
            if ranks:
                names = different[ranks[0]]
                shown = ", ".join(names[:NAMES_SHOWN]) + (
                    f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                )
                where = f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more ranks" if len(ranks) > 1 else "")
                return f"differs first at step {step}, in its {kind}, on {where}: {shown}"
    return None


def _compare(left: StepFingerprint, right: StepFingerprint, kind: str) -> list[str]:
    mine: dict[str, int] = getattr(left, kind)
    other: dict[str, int] = getattr(right, kind)
    return [name for name in dict.fromkeys([*other, *mine]) if mine.get(name) != other.get(name)]
