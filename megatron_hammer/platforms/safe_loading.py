"""Pickles of a checkpoint are data in the training process too: whichever way Megatron or torch reads one.

Two functions read all of them: `torch.load`, and the unpickler of torch's filesystem reader. Both are replaced here by
ones that build values, tensors and a fixed list of types. Installed by `megatron_compat.install`; the tools, which run
without Megatron, use checkpoint_files/pickle_reader.py.
"""

import enum
import functools
import importlib
import os
import pickle
import zipfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy
import numpy.dtypes
import torch

from megatron_hammer.checkpoint_files.pickle_reader import (
    METADATA_RECORDS,
    METADATA_TYPES,
    STAND_IN_PREFIXES,
    TENSOR_PROPERTIES,
    build_stand_ins,
    describe_failure,
)
from megatron_hammer.errors import CheckpointError


def apply() -> None:
    """Replace both readers for the rest of the process."""
    from torch.distributed.checkpoint import filesystem

    torch.load = load_data_only(torch.load)
    # The module reads and writes `.metadata` with it, and nothing else.
    vars(filesystem)["pickle"] = SimpleNamespace(load=load_metadata, dump=pickle.dump)


def load_data_only(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.load: always weights_only=True, whatever the caller or TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says.

    Allowed besides are the types that Megatron allows (megatron.core.safe_globals) and its enums; its other types,
    which other versions saved, become inert records. Raises CheckpointError naming the file and the refused types.
    """

    @functools.wraps(load)
    def load_data(file: Any, *args: Any, **kwargs: Any) -> Any:
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses it beside weights_only=True
        kwargs.pop("pickle_module", None)
        kwargs["weights_only"] = True
        names = list_unlisted_types(file)
        allowed = [*_list_numpy_types(), *(entry for name in names if (entry := _find_enum(name)) is not None)]
        found = {name for _, name in allowed}
        allowed += build_stand_ins((name for name in names if name not in found), STAND_IN_PREFIXES)
        try:
            with torch.serialization.safe_globals(allowed):
                return load(file, *args, **kwargs)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise CheckpointError(
                f"{_name_of(file)}: must be a torch file of plain values and tensors, got {_describe(names, error)}. "
                "Do not use it: it is damaged, or made to run code when it is read."
            ) from error

    return load_data


def list_unlisted_types(file: Any) -> list[str]:
    """The types that a torch file names and torch does not allow; none where torch cannot tell without reading it."""
    start = file.tell() if hasattr(file, "seek") else None
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (ValueError, RuntimeError, OSError, zipfile.BadZipFile, pickle.UnpicklingError):
        return []  # damaged, or of before torch 1.6; the loading itself refuses what is not allowed
    finally:
        if start is not None:
            file.seek(start)


@functools.cache
def _list_numpy_types() -> tuple[tuple[Any, str], ...]:
    """Numbers and arrays of numpy, under the names of numpy 1 and 2; building one runs no code of the file."""
    multiarray = numpy._core.multiarray  # type: ignore[attr-defined]
    makers = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    types = [
        (found, f"numpy.dtypes.{name}")
        for name in numpy.dtypes.__all__
        if isinstance(found := getattr(numpy.dtypes, name), type)
    ]
    return (*makers, *types, (numpy.ndarray, "numpy.ndarray"), (numpy.dtype, "numpy.dtype"))


def _find_enum(name: str) -> tuple[Any, str] | None:
    """The enum of Megatron's with this name; making a member of one runs no code of the file."""
    module_name, _, type_name = name.rpartition(".")
    if not module_name.startswith(STAND_IN_PREFIXES):
        return None
    try:
        found = getattr(importlib.import_module(module_name), type_name, None)
    except ImportError:
        return None
    return (found, name) if isinstance(found, type) and issubclass(found, enum.Enum) else None


def _describe(names: list[str], error: Exception) -> str:
    refused = [name for name in names if not name.startswith(STAND_IN_PREFIXES)]
    return f"the types {', '.join(refused)}" if refused else describe_failure(error)


def _name_of(file: Any) -> str:
    return str(getattr(file, "name", None) or (file if isinstance(file, str | os.PathLike) else "an object of a shard"))


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The types of torch's that metadata needs; raises UnpicklingError for every other name."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in METADATA_TYPES | METADATA_RECORDS | {TENSOR_PROPERTIES}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"type {module}.{name} is not on the list of those that metadata needs")


def load_metadata(file: BinaryIO) -> Any:
    """In place of pickle.load in torch.distributed.checkpoint.filesystem."""
    try:
        return _MetadataUnpickler(file).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise CheckpointError(
            f"{_name_of(file)}: must be metadata as torch.distributed.checkpoint writes it, got "
            f"{describe_failure(error)}. Do not use it: it is damaged, or made to run code when it is read."
        ) from error
