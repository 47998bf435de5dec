"""Reads a checkpoint of any layout, one tensor at a time, with no process group, GPU or megatron.

`open_checkpoint` takes torch_dist, read here, and legacy mp_rank_* folders (legacy/reader.py). torch_dist keeps global
tensors cut into chunks, and the layers of a model stacked into one tensor with a leading layer axis (and experts with
an expert axis after it). Here every layer and expert has a name of its own,
`decoder.layers.3.mlp.experts.experts.1.linear_fc1.weight`, and a read touches only the chunks it needs. Megatron's
`_extra_state` is left out, and so is the optimizer's state, except its fp32 weights when they are asked for.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import (
    OPTIMIZER_PREFIXES,
    remove_padding_rows,
    use_fused_norm_names,
)
from megatron_hammer.checkpoint_files.saved_arguments import complete_arguments
from megatron_hammer.checkpoint_files.torch_dist.save_consistency import validate_one_save
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import split_stack
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError

# The fp32 copy of a weight: "param" by the distributed optimizer, "fp32_param" by the plain one. Optimizers of dense
# and expert weights, which Megatron chains, share the prefix; before megatron-core 0.13 each had its own.
_MASTER_WEIGHT = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBox:
    """Where one tensor of one layer lies: a box in a stored global tensor, whose leading axes `shape` leaves out."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the box, on every axis of the global tensor."""
        return (*([1] * (len(self.offsets) - len(self.shape))), *self.shape)


class TorchDistReader:
    """A CheckpointReader of a torch_dist directory. store: everything in it, by its own keys."""

    def __init__(self, directory: Path, *, weights: str = "model"):
        self.directory = directory
        self.store = TorchDistStore(directory)
        keys = self._list_keys() if weights == "model" else self._find_master_keys()
        self.tensors = use_fused_norm_names(dict(self._list_tensors(keys)))
        self.store.validate({stored.key for stored in self.tensors.values()})
        self.saved_args: Any = self.store.common_state["args"]
        self.args: Any = complete_arguments(self.saved_args)
        self.iteration: int = self.store.common_state["iteration"]

    def validate_one_save(self) -> int:
        """Raise CheckpointError if files of two saves are found to be mixed; see save_consistency.py.

        Returns how many pairs of files were compared.
        """
        return validate_one_save(self.store, self._list_copies())

    def remove_vocab_padding(self, vocab_size: int) -> None:
        """Let the embedding and the head have `vocab_size` rows from now on; the padding is not read."""
        remove_padding_rows(self.tensors, vocab_size)

    def read(self, name: str) -> Tensor:
        """The tensor of that mcore name in its stored dtype: a view of the file where one chunk holds all of it.

        Raises CheckpointError if a chunk is missing or damaged.
        """
        stored = self.tensors[name]
        return self.store.read(stored.key, stored.offsets, stored.sizes).reshape(stored.shape)

    def _list_keys(self) -> dict[str, str]:
        """The key of every weight, by the key that the model has for it: the same."""
        return {
            key: key
            for key in self.store.tensors
            if not key.startswith(OPTIMIZER_PREFIXES) and "_extra_state" not in key
        }

    def _find_master_keys(self) -> dict[str, str]:
        """The key of every weight's fp32 copy in the optimizer's state, by the key that the model has for it.

        A weight that the model itself has in fp32 needs no copy. Raises CheckpointError if any other has none.
        """
        # The copies replace the weights; a weight without a copy stays, and must be fp32 itself.
        keys = self._list_keys() | self._list_copies()
        lacking = [
            key
            for key, master in keys.items()
            if self.store.tensors[master].dtype != torch.float32
            or self.store.tensors[master].shape != self.store.tensors[key].shape
        ]
        if lacking:
            raise CheckpointError(
                f"{self.directory}: fp32 master weights must be in the optimizer's state in the model's shapes, got "
                f"none of {len(lacking)} tensors ({lacking[0]}, ...). Pass --weights model; checkpoints saved with the "
                "optimizer and --dist-ckpt-optim-fully-reshardable, the default, have them."
            )
        return keys

    def _list_copies(self) -> dict[str, str]:
        """The key of the fp32 copy of every weight that has one, by the key that the model has for it."""
        copies = {match[1]: key for key in self.store.tensors if (match := _MASTER_WEIGHT.match(key))}
        return {key: copies[key] for key in self._list_keys() if key in copies}

    def _list_tensors(self, keys: Mapping[str, str]) -> Iterator[tuple[str, TensorBox]]:
        for key, stored_key in keys.items():
            stored = self.store.tensors[stored_key]
            for name, tensor in _unstack(key, stored.shape, stored.dtype):
                yield name, replace(tensor, key=stored_key)


def _unstack(key: str, size: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, TensorBox]]:
    """One entry for every layer and expert of a stored tensor whose leading axes they are."""
    name, num_stacked = split_stack(key)
    # Without stacked axes the product has one element, the empty index, and the tensor is one entry.
    for indices in itertools.product(*map(range, size[:num_stacked])):
        shape = size[num_stacked:]
        offsets = (*indices, *([0] * len(shape)))
        yield name.format(*indices), TensorBox(key=key, offsets=offsets, shape=shape, dtype=dtype)
