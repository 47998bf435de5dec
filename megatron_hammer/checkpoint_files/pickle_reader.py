"""Reads the pickles inside a torch_dist checkpoint without letting them run code.

Two kinds: `.metadata`, a plain pickle, goes through an unpickler with a fixed list of types; every other object is a
torch file and goes through `torch.load(weights_only=True)`, where megatron's own enums and records become inert
`MegatronObject`s. So a checkpoint can be read without importing megatron, and an unlisted type stops the reading.
"""

import argparse
import contextlib
import io
import pathlib
import pickle
import re
import signal
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_hammer.errors import CheckpointError

METADATA_TYPES = frozenset(
    {
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    }
)
# These become records that keep what was pickled: importing torch.distributed takes seconds. Megatron-core before 0.16
# had subclasses of its own, which only add to torch's.
METADATA_RECORDS = frozenset(
    {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    }
)
TENSOR_PROPERTIES = ("torch.distributed.checkpoint.metadata", "TensorProperties")
# What objects may hold besides plain values and tensors, with the name by which it is pickled. Not from __module__:
# Python 3.13 pickles a path under another module than other versions do, and must read their files too.
KNOWN_TYPES: tuple[tuple[Any, str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (types.SimpleNamespace, "types.SimpleNamespace"),
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (signal.Signals, "signal.Signals"),
)
STAND_IN_PREFIXES = ("megatron.core.", "megatron.training.", "transformer_engine.")
ALLOWED = (
    f"Allowed are plain values, tensors, {', '.join(name for _, name in KNOWN_TYPES)}, and the types under "
    f"{', '.join(prefix + '*' for prefix in STAND_IN_PREFIXES)}, which become inert records"
)


_MAX_REASON_CHARS = 300


class MegatronObject:
    """Stands in for a type that a file names, such as an enum or a record of megatron; it has no behaviour.

    global_name: the type's own, `megatron.core.transformer.enums.AttnBackend`. values: what it was called with, as an
    enum is; None if it was made empty, as a record is. state: what it was then given, None for nothing.
    """

    global_name = ""
    values: tuple[Any, ...] | None = None
    state: Any = None

    def __init__(self, *values: Any):
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state  # as it is: a record's is a dictionary of its fields, a numpy array's is a tuple

    def __deepcopy__(self, memo: dict[int, Any]) -> "MegatronObject":
        return self  # nothing changes it, and Python's own way would hand its attributes to __setstate__

    def __repr__(self) -> str:
        parts = (self.state,) if self.values is None else self.values
        return f"{type(self).__name__}({', '.join(map(repr, parts))})"


class MetadataRecord:
    """Stands in for a record or an enum of torch.distributed.checkpoint: its attributes, no behaviour."""

    def __init__(self, *values: Any):
        self.values = values


class _TensorProperties:
    """Of the tuple that torch pickles, what a reader needs."""

    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]  # the first field of TensorProperties.__getstate__


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the listed type or its inert record; raises UnpicklingError for every other name."""
        if (module, name) in METADATA_TYPES:
            return super().find_class(module, name)
        if (module, name) in METADATA_RECORDS:
            return type(name, (MetadataRecord,), {})
        if (module, name) == TENSOR_PROPERTIES:
            return _TensorProperties
        # A dtype is pickled by its name in torch. Most other attributes of torch can be called.
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"type {module}.{name} is not on the list of those that metadata needs")


def read_metadata(path: Path) -> Any:
    """The torch.distributed.checkpoint Metadata in `path`, as records with its attributes.

    Raises CheckpointError if the file is missing, damaged or holds a type that such a file never needs.
    """
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(
            f"{path}: file must be readable, got {error.strerror}. The save was interrupted or the copy is incomplete."
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise _unreadable(path, error) from error


def read_object(file: BinaryIO | io.BytesIO, *, where: str | Path) -> Any:
    """A tensor or a plain object that torch.save wrote; raises CheckpointError, naming `where`, if it is neither."""
    try:
        with allow_only(KNOWN_TYPES):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            stand_ins = build_stand_ins(names, STAND_IN_PREFIXES)
            # torch.load stops at the first type that it does not allow. Here all of them are named.
            if refused := sorted({*names} - {name for _, name in stand_ins}):
                raise pickle.UnpicklingError(f"types that are not on the list: {', '.join(refused)}. {ALLOWED}")
            with torch.serialization.safe_globals(stand_ins):
                # Not torch.load: platforms/safe_loading.py replaces it in a training process, with other types allowed.
                return torch.serialization.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files can raise nearly anything
        raise _unreadable(where, error) from error


def build_stand_ins(names: Iterable[str], prefixes: tuple[str, ...]) -> list[Any]:
    """A new inert type for every name with one of the prefixes, as torch.load's list of safe types wants them."""
    wanted = [name for name in names if name.startswith(prefixes)]
    return [(type(name.rpartition(".")[2], (MegatronObject,), {"global_name": name}), name) for name in wanted]


@contextlib.contextmanager
def allow_only(types_and_names: Sequence[Any]) -> Iterator[None]:
    """Let torch.load build these and what it always allows, whatever this process allowed: megatron adds numpy's."""
    allowed_before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(list(types_and_names)):
            yield
    finally:
        # The list belongs to the whole process: others who added to it still need their types.
        torch.serialization.add_safe_globals(allowed_before)


def describe_failure(error: Exception) -> str:
    """Why torch.load or an unpickler stopped, in one line; without torch's advice to run the code of the file."""
    text = " ".join(str(error).split())
    if refused := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text):
        return f"type {refused[1].rstrip('.')} is not on the list of types that are read"
    if "weights_only" in text:
        # "WeightsUnpickler error: X" is the cause; what torch says around it is about itself.
        cause = re.search(r"WeightsUnpickler error: (.*?)(?: Please file an issue| Check the documentation|$)", text)
        text = cause[1] if cause else "contents that only running the code of the file could read"
    return f"{type(error).__name__}: {text[:_MAX_REASON_CHARS]}".rstrip(".")


def _unreadable(where: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{where}: contents must be what torch_dist writes, got {describe_failure(error)}. "
        "The file is damaged or not a checkpoint; use another iteration or copy it again."
    )
