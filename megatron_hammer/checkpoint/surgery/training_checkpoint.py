"""A checkpoint that is about to be edited: the weights, the optimizer's tensors and the state of the training loop.

torch_dist/reader.py names the tensors of each layer. Surgery keeps megatron's own keys, so that what is not edited is
copied unchanged.
"""

import copy
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.surgery.legacy_source import LegacyStore
from megatron_hammer.checkpoint_files.checkpoint_reader import OPTIMIZER_PREFIXES, RELEASE, validate_iteration
from megatron_hammer.checkpoint_files.open_checkpoint import find_iteration, is_legacy
from megatron_hammer.checkpoint_files.torch_dist.description import StoredGlobal
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.errors import CheckpointError

RNG_PREFIX = "rng_state/"
RERUN_PREFIX = "rerun_state_machine_state/"
_OPTIMIZER_PREFIX = re.compile(r"^optimizer\.state\.([^.]+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCheckpoint:
    """One iteration, opened. model: the parameters by key. optimizer: its tensors by key; empty without one.

    iteration: None for a release, which training starts from at step 0 with a fresh optimizer.
    """

    store: TorchDistStore | LegacyStore
    model: dict[str, StoredGlobal]
    optimizer: dict[str, StoredGlobal]
    iteration: int | None

    @property
    def directory(self) -> Path:
        return self.store.directory

    @property
    def args(self) -> Any:
        return self.store.common_state["args"]

    def copy_common_state(self) -> dict[str, Any]:
        """A deep copy, whose arguments may be changed."""
        state = copy.deepcopy(self.store.common_state)
        state["args"] = Namespace(**vars(state["args"]))
        return state

    def list_objects(self, *prefixes: str) -> list[str]:
        """Keys of the non-tensor entries that begin with `prefix`."""
        return [key for key in self.store.objects if key.startswith(prefixes)]

    def list_model_objects(self) -> list[str]:
        """What layers store beside their parameters (megatron's `_extra_state`)."""
        return [key for key in self.store.objects if "_extra_state" in key]


def open_training_checkpoint(path: Path, *, iteration: int | None = None) -> TrainingCheckpoint:
    """Open what --save wrote (the latest or the given iteration), or one iteration of it.

    Of a legacy checkpoint only the weights are read, as a release.
    Raises CheckpointError if it is missing, incomplete, of another format, or mixed from two iterations.
    """
    directory = find_iteration(path, iteration)
    store: TorchDistStore | LegacyStore = LegacyStore(directory) if is_legacy(directory) else TorchDistStore(directory)
    store.validate()
    iteration = store.common_state["iteration"]
    validate_iteration(directory, iteration)
    # An extra state may be stored as a tensor, but it is no parameter.
    tensors = {key: stored for key, stored in store.tensors.items() if "_extra_state" not in key}
    return TrainingCheckpoint(
        store=store,
        model={key: stored for key, stored in tensors.items() if not key.startswith(OPTIMIZER_PREFIXES)},
        optimizer={key: stored for key, stored in tensors.items() if key.startswith(OPTIMIZER_PREFIXES)},
        iteration=None if directory.name == RELEASE or isinstance(store, LegacyStore) else iteration,
    )


def split_optimizer_key(key: str) -> tuple[str, str] | None:
    """(kind of state, key of its parameter), as `optimizer.state.exp_avg.<key>`; None for another form of state."""
    match = _OPTIMIZER_PREFIX.match(key)
    return (match[1], key[match.end() :]) if match else None


def parameter_key(key: str) -> str:
    """The key of the parameter that a tensor belongs to: its own key, or the one whose optimizer state it is."""
    parts = split_optimizer_key(key)
    return parts[1] if parts else key


def require_reshardable_optimizer(checkpoint: TrainingCheckpoint, *, remedy: str) -> None:
    """Raise CheckpointError where the optimizer is not stored parameter by parameter, in the parameter's shape.

    Megatron's `fully_reshardable` format is, and what it writes without the distributed optimizer.
    """
    metadata = checkpoint.store.common_state.get("content_metadata") or {}
    # Absent without the distributed optimizer, whose state has the shape of its parameters anyway.
    sharding = metadata.get("distrib_optim_sharding_type", "fully_reshardable")
    where = checkpoint.directory
    problems = []
    if sharding != "fully_reshardable" and not _has_no_optimizer(checkpoint):
        problems.append(f"{where}: optimizer must be stored as fully_reshardable, got {sharding}. {remedy}")
    else:
        for key, stored in checkpoint.optimizer.items():
            owner = checkpoint.model.get(parameter_key(key)) if split_optimizer_key(key) else None
            if owner is None or owner.shape != stored.shape:
                found = "no such parameter" if owner is None else f"{owner.shape}"
                problems.append(
                    f"{key}: optimizer state must have the shape of its parameter, got {stored.shape} for {found} in "
                    f"{where}. {remedy}"
                )
    if problems:
        raise CheckpointError(*problems)


def _has_no_optimizer(checkpoint: TrainingCheckpoint) -> bool:
    return not checkpoint.optimizer and not checkpoint.list_objects(*OPTIMIZER_PREFIXES)
