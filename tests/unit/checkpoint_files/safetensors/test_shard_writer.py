"""The safetensors library reads the streamed shards bit for bit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardWriter, plan_shards


def write_shards(directory, shards, tensors, *, dtype):
    with ShardWriter(directory, shards) as writer:
        for name, tensor in tensors:
            assert writer.write(name, tensor).holds(tensor)


SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_was_written(tmp_path, dtype):
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    shards = plan_shards(SHAPES, dtype=dtype, max_shard_bytes=10**9)
    write_shards(tmp_path, shards, tensors.items(), dtype=dtype)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_shards_stay_under_the_limit_and_are_indexed(tmp_path):
    shards = plan_shards(SHAPES, dtype=torch.float32, max_shard_bytes=90)
    assert [list(shard.shapes) for shard in shards] == [["a", "b"], ["c"]]  # 60 + 28, then 96 alone
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_shards(tmp_path, shards, tensors.items(), dtype=torch.float32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 60 + 28 + 96
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], tensors[name])


def test_a_view_and_a_transposed_tensor_are_written_in_their_own_order(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"view": whole[1:3], "transposed": whole.t()}
    shards = plan_shards({name: tuple(t.shape) for name, t in tensors.items()}, dtype=whole.dtype, max_shard_bytes=999)
    write_shards(tmp_path, shards, tensors.items(), dtype=whole.dtype)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 90])
def test_tensors_may_come_in_any_order(tmp_path, max_shard_bytes):
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    shards = plan_shards(SHAPES, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    write_shards(tmp_path, shards, [(name, tensors[name]) for name in ("c", "a", "b")], dtype=torch.float32)
    for shard in shards:
        read = load_file(tmp_path / shard.file_name)
        assert list(read) == list(shard.shapes)
        assert all(torch.equal(read[name], tensors[name]) for name in shard.shapes)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([("b", torch.ones(1))], "b was not planned, or came twice"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "a was not planned, or came twice"),
        ([("a", torch.ones(2))], r"a was planned as \(1,\) torch.float32, got \(2,\) torch.float32"),
        ([("a", torch.ones(1).half())], r"a was planned as \(1,\) torch.float32, got \(1,\) torch.float16"),
    ],
)
def test_writing_an_unplanned_tensor_is_an_internal_error(tmp_path, tensors, message):
    shards = plan_shards({"a": (1,)}, dtype=torch.float32, max_shard_bytes=99)
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, shards, tensors, dtype=torch.float32)


def test_a_missing_planned_tensor_is_an_internal_error(tmp_path):
    shards = plan_shards({"a": (1,), "b": (1,)}, dtype=torch.float32, max_shard_bytes=99)
    with pytest.raises(ValueError, match="b was planned and never written"):
        write_shards(tmp_path, shards, [("a", torch.ones(1))], dtype=torch.float32)


@pytest.mark.parametrize("position", [0, 5_000_000, 9_999_999])
def test_twin_a_bit_that_changed_on_disk_is_found(tmp_path, position):
    tensor = torch.zeros(10_000_000, dtype=torch.uint8).view(torch.bfloat16)
    shards = plan_shards({"a": (5_000_000,)}, dtype=torch.bfloat16, max_shard_bytes=10**9)
    with ShardWriter(tmp_path, shards) as writer:
        written = writer.write("a", tensor)
        assert written.holds(tensor)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(written.start + position)
            file.write(b"\x01")
        assert not written.holds(tensor)
        os.truncate(tmp_path / "model.safetensors", written.start + 5)
        assert not written.holds(tensor)
