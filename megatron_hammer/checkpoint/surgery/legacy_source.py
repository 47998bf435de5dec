"""The weights of a legacy checkpoint (mp_rank_* files) under torch_dist's keys, for the edits that need only weights.

It has the interface of a `TorchDistStore` whose chunks are single layers and experts. The optimizer of a legacy
checkpoint belongs to its layout and is left out, so the edited checkpoint is a release.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.legacy.reader import open_legacy_checkpoint
from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.checkpoint_files.torch_dist.description import StoredChunk, StoredGlobal
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import (
    extra_state_key,
    stack_name,
    stacks_layers,
)
from megatron_hammer.errors import CheckpointError

Indices = tuple[int, ...]


class LegacyStore:
    """One iteration of a legacy checkpoint; the attributes and methods that surgery uses of a `TorchDistStore`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._reader = open_legacy_checkpoint(directory)
        self._names: dict[str, dict[Indices, str]] = {}
        self._has_layer_axis = stacks_layers(self._reader.args)
        for name in self._reader.tensors:
            stacked = stack_name(name, has_layer_axis=self._has_layer_axis)
            self._names.setdefault(stacked.key, {})[stacked.indices] = name
        self.tensors = {key: self._describe(key) for key in self._names}

    @cached_property
    def common_state(self) -> dict[str, Any]:
        return {"args": self._reader.args, "iteration": self._reader.iteration, "checkpoint_version": 3.0}

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Extra states of the layers, which torch_dist wants even where they hold nothing."""
        args = self._reader.args
        num_experts = getattr(args, "num_experts", None) or 0
        keys = (
            extra_state_key(
                name, num_layers=args.num_layers, num_experts=num_experts, has_layer_axis=self._has_layer_axis
            )
            for name in self._reader.tensors
        )
        return tuple(dict.fromkeys(key for key in keys if key is not None))

    def validate(self) -> None:
        """Nothing to do: everything was validated when the checkpoint was opened."""

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of the stacked layers (and experts); a view if the box is one whole layer or expert."""
        names = self._names[key]
        num_stacked = len(next(iter(names)))
        ranges = [range(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
        inner = tuple(slice(axis.start, axis.stop) for axis in ranges[num_stacked:])
        places = itertools.product(*ranges[:num_stacked])
        parts = [self._reader.read(names[place])[inner] for place in places]
        # stack copies; a single layer stays a view of the file.
        whole = parts[0] if len(parts) == 1 else torch.stack(parts)
        return whole.reshape(tuple(sizes))

    def read_object_bytes(self, key: str) -> bytes:
        """An empty extra state."""
        return dump_object([None])

    def _describe(self, key: str) -> StoredGlobal:
        names = self._names[key]
        first = self._reader.tensors[next(iter(names.values()))]
        # Indices begin at 0, so the largest of each axis is its size minus one, if none is missing (checked below).
        stacked = tuple(1 + max(axis) for axis in zip(*names, strict=True))
        odd = [name for name in names.values() if self._reader.tensors[name].shape != first.shape]
        if odd or len(names) != len(list(itertools.product(*map(range, stacked)))):
            raise CheckpointError(
                f"{self.directory}: layers must be alike, got {len(names)} of {key}, {len(odd)} of another shape. "
                "Only models with equal layers can be edited."
            )
        return StoredGlobal(
            shape=(*stacked, *first.shape),
            dtype=first.dtype,
            chunks=tuple(
                StoredChunk((*place, *([0] * len(first.shape))), (*([1] * len(place)), *first.shape)) for place in names
            ),
        )
