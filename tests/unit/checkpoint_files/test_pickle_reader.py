"""No code in a checkpoint runs: unlisted types are refused, and megatron's own types become inert objects."""

import io
import os
import pickle
import sys
import types
from argparse import Namespace
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_hammer.checkpoint_files.pickle_reader import MegatronObject, read_metadata, read_object
from megatron_hammer.errors import CheckpointError


class RunsACommand:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_twin_the_attack_works_with_plain_pickle(tmp_path):
    pickle.loads(pickle.dumps(RunsACommand(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_metadata_cannot_run_a_command(tmp_path):
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(RunsACommand(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"type posix.mkdir is not on the list"):
        read_metadata(path)
    assert not (tmp_path / "ran").exists()


def test_an_object_cannot_run_a_command(tmp_path):
    message = (
        r"shard.distcp: contents must be what torch_dist writes, got UnpicklingError: types that are not on the list: "
        r"posix.mkdir. Allowed are plain values, tensors, argparse.Namespace, .* which become inert records"
    )
    with pytest.raises(CheckpointError, match=message):
        read_object(saved({"args": RunsACommand(tmp_path / "ran")}), where="shard.distcp")
    assert not (tmp_path / "ran").exists()


def test_types_allowed_for_torch_load_are_still_refused(tmp_path):
    """Importing megatron puts types of its own and of numpy on torch's list."""
    with torch.serialization.safe_globals([(os.mkdir, "posix.mkdir")]):
        allowed = torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointError, match=r"types that are not on the list: posix.mkdir"):
            read_object(saved(RunsACommand(tmp_path / "ran")), where="shard.distcp")
        assert {*map(str, torch.serialization.get_safe_globals())} == {*map(str, allowed)}  # a set, in torch too
    assert not (tmp_path / "ran").exists()


def test_an_attribute_of_torch_that_is_not_a_dtype_is_refused(tmp_path):
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(torch.serialization.load))
    with pytest.raises(CheckpointError, match="is not on the list"):
        read_metadata(path)
    path.write_bytes(pickle.dumps(torch.bfloat16))
    assert read_metadata(path) is torch.bfloat16


def test_metadata_of_earlier_megatron_is_read_without_its_classes(tmp_path, monkeypatch):
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)
    module.MCoreMetadata = type("MCoreMetadata", (Metadata,), {"__module__": name})
    module.Evil = type("Evil", (), {"__module__": name})
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):  # each of them, so that pickle finds the class by its name
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), module)
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(module.MCoreMetadata({"a": BytesStorageMetadata()}, storage_data={})))
    entries = read_metadata(path).state_dict_metadata
    assert {key: type(entry).__name__ for key, entry in entries.items()} == {"a": "BytesStorageMetadata"}
    path.write_bytes(pickle.dumps(module.Evil()))
    with pytest.raises(CheckpointError, match=r"type megatron.core.dist_checkpointing.strategies.torch.Evil is not on"):
        read_metadata(path)


def test_missing_and_damaged_metadata(tmp_path):
    with pytest.raises(CheckpointError, match="file must be readable, got No such file"):
        read_metadata(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04 no pickle")
    with pytest.raises(CheckpointError, match="The file is damaged or not a checkpoint"):
        read_metadata(tmp_path / ".metadata")


@pytest.fixture
def megatron_enum(monkeypatch):
    """An enum that pickles as megatron's, in a module that is gone when it is read."""
    name = "megatron.core.made_up"
    module = types.ModuleType(name)
    module.Mode = Enum("Mode", {"FAST": "fast"}, module=name)
    for part in ("megatron", "megatron.core", name):
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    value = Namespace(mode=module.Mode.FAST, seq_length=16, dtype=torch.bfloat16)
    file = saved([{"args": value}])
    monkeypatch.delitem(sys.modules, name)
    return file


def test_megatrons_types_become_inert_and_the_rest_is_read(megatron_enum):
    args = read_object(megatron_enum, where="shard")[0]["args"]
    assert (args.seq_length, args.dtype) == (16, torch.bfloat16)
    assert isinstance(args.mode, MegatronObject)
    assert args.mode.values == ("fast",)
    assert repr(args.mode) == "Mode('fast')"
    assert args.mode.global_name == "megatron.core.made_up.Mode"
