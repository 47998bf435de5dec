"""Objects that were read without megatron are written so that megatron reads them."""

import enum
import io
import sys
import types
from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_hammer.checkpoint_files.pickle_reader import MegatronObject, read_object
from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.errors import CheckpointError


class Mode(enum.Enum):
    """Stands for an enum of megatron."""

    FAST = "fast"
    SLOW = "slow"


class Record:
    """Stands for a record of megatron: pickled by its fields, not by what made it."""

    def __init__(self, name: str):
        self.name = name


@pytest.fixture
def megatron_types(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.core.toy_types")
    for kind in (Mode, Record):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def save(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.usefixtures("megatron_types")
def test_types_of_megatron_are_written_back_under_their_names() -> None:
    original = {
        "args": Namespace(mode=Mode.SLOW, dtype=torch.bfloat16, sizes=[1, 2], nothing=None),
        "record": Record("first"),
        "modes": [Mode.FAST, Mode.FAST],
        "tensor": torch.arange(6.0).reshape(2, 3),
    }
    inert = read_object(io.BytesIO(save(original)), where="toy")
    assert isinstance(inert["args"].mode, MegatronObject)
    assert isinstance(inert["record"], MegatronObject)
    again = torch.serialization.load(io.BytesIO(dump_object(inert)), weights_only=False)
    assert again["args"] == original["args"]
    assert again["args"].mode is Mode.SLOW
    assert again["modes"] == [Mode.FAST, Mode.FAST]
    assert type(again["record"]) is Record
    assert again["record"].name == "first"
    assert torch.equal(again["tensor"], original["tensor"])


@pytest.mark.usefixtures("megatron_types")
def test_a_changed_value_is_written_and_the_plain_pickler_cannot() -> None:
    inert = read_object(io.BytesIO(save({"mode": Mode.SLOW})), where="toy")
    inert["mode"].values = ("fast",)
    assert torch.serialization.load(io.BytesIO(dump_object(inert)), weights_only=False) == {"mode": Mode.FAST}
    with pytest.raises(Exception, match="Mode"):
        save(inert)


def test_plain_values_are_written_as_torch_saves_them() -> None:
    value = {"numbers": [1, 2.5, None], "names": {"a", "b"}, "tensor": torch.ones(3), "pair": (True, b"x")}
    data = dump_object(value)
    assert len(data) == len(save(value))
    loaded = torch.serialization.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(loaded.pop("tensor"), value.pop("tensor"))
    assert loaded == value


def test_reading_back_still_refuses_code() -> None:
    class Dangerous:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("run",)

    with pytest.raises(CheckpointError, match="toy: contents must be what torch_dist writes"):
        read_object(io.BytesIO(dump_object(Dangerous())), where="toy")
