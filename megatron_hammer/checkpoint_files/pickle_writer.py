"""Writes objects that pickle_reader.py has read: megatron's enums and records get megatron's own names again.

An edited checkpoint keeps the saved arguments and the state of the training loop, which hold a few types of megatron.
They were read as inert `MegatronObject`s and are written without importing megatron. Read next: pickle_reader.py.
"""

import copyreg
import io
import pickle
import sys
import types
from typing import Any

import torch

from megatron_hammer.checkpoint_files.pickle_reader import MegatronObject


class StandInPickler(pickle._Pickler):  # the C pickler insists on importing what it names
    """Pickles inert records under the names of the types that they stand in for."""

    def reducer_override(self, obj: Any) -> Any:
        """An enum is its type called with its values; a record is made empty and given its fields."""
        if isinstance(obj, type) and issubclass(obj, MegatronObject):
            return obj.__name__  # by its name: save_global
        if not isinstance(obj, MegatronObject):
            return NotImplemented
        if obj.values is None:
            return copyreg.__newobj__, (type(obj),), obj.state  # type: ignore[attr-defined]
        return type(obj), obj.values, obj.state

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not (isinstance(obj, type) and issubclass(obj, MegatronObject)):
            super().save_global(obj, name)  # type: ignore[misc]
            return
        module, _, type_name = obj.global_name.rpartition(".")
        # torch.load(weights_only=True) does not know STACK_GLOBAL; torch.save writes protocol 2.
        if self.proto >= 4:  # type: ignore[attr-defined]
            self.save(sys.intern(module))  # type: ignore[attr-defined]  # one object, written once
            self.save(type_name)  # type: ignore[attr-defined]
            self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
        else:
            self.write(pickle.GLOBAL + f"{module}\n{type_name}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


_PICKLE_MODULE = types.ModuleType("pickle")
_PICKLE_MODULE.Pickler = StandInPickler  # type: ignore[attr-defined]


def dump_object(value: Any) -> bytes:
    """The torch file of `value`, which `torch.load` reads; plain values as torch.save writes them."""
    file = io.BytesIO()
    torch.save(value, file, pickle_module=_PICKLE_MODULE)
    return file.getvalue()
