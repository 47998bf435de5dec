"""Detects files of two iterations in one torch_dist directory, as far as their contents allow.

The files of a run have the same names, sizes and offsets at every iteration; only the common state names the iteration.
But in half-precision training each weight is the rounded fp32 weight of the optimizer's state, and with data
parallelism the two often lie in different files. For every two such files, one pair of tensors is compared. If every
file holds both tensors of its pairs, as without data parallelism, mixed files cannot be detected.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.torch_dist.description import StoredChunk
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_MIN_ELEMENTS = 1024  # the few weights of a norm may be equal at two iterations


@dataclass(frozen=True, slots=True)
class WeightPair:
    """A chunk of a weight and the chunk of its fp32 copy at the same place."""

    key: str
    master_key: str
    chunk: StoredChunk


def validate_one_save(store: TorchDistStore, master_keys: dict[str, str]) -> int:
    """Compare weights with their fp32 copies in other files; returns how many pairs of files were compared.

    master_keys: of every weight's key; copies in files that are gone are left out.
    Raises one CheckpointError with a sentence for every two files that disagree.
    """
    chosen: dict[tuple[str, str], WeightPair] = {}
    for files, pair in _list_pairs(store, master_keys):
        known = chosen.get(files)
        if known is None or _rank(pair) < _rank(known):
            chosen[files] = pair
    problems = []
    for (file, master_file), pair in chosen.items():
        weight = store.read(pair.key, pair.chunk.offsets, pair.chunk.sizes)
        master = store.read(pair.master_key, pair.chunk.offsets, pair.chunk.sizes)
        # Megatron rounds the fp32 weight to the model's dtype after each step, so the bits must be equal.
        if not is_bitwise_equal(master.to(weight.dtype), weight):
            problems.append(
                f"{store.directory}: {file} and {master_file} must be of one save, got {pair.key} that is not "
                "its rounded fp32 copy. Files of two checkpoints are mixed; copy it again, or use another iteration."
            )
    if problems:
        raise CheckpointError(*problems)
    return len(chosen)


def _list_pairs(store: TorchDistStore, master_keys: dict[str, str]) -> Iterator[tuple[tuple[str, str], WeightPair]]:
    for key, master_key in master_keys.items():
        if store.tensors[key].dtype not in _HALF_DTYPES or store.tensors[master_key].dtype != torch.float32:
            continue
        copies = set(store.tensors[master_key].chunks)
        for chunk in store.tensors[key].chunks:
            if chunk not in copies:
                continue
            files = (store.file_of(key, chunk), store.file_of(master_key, chunk))
            # One file is written in one save, so a pair inside one file shows nothing.
            if files[0] != files[1] and (store.directory / files[1]).is_file():
                yield files, WeightPair(key, master_key, chunk)


def _rank(pair: WeightPair) -> tuple[bool, int]:
    """The smallest of those that are large enough comes first."""
    num_elements = math.prod(pair.chunk.sizes)
    return num_elements < _MIN_ELEMENTS, num_elements
