"""Rows of a checkpoint's tensor go where its layout sends them, in any dtype, whatever pieces they are stored in."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from megatron_hammer.checkpoint.convert import row_blocks as row_copy
from megatron_hammer.checkpoint.convert.proofs import find_row_runs
from megatron_hammer.checkpoint.convert.row_blocks import copy_rows, find_stored_rows
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardWriter, plan_shards
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import toy_arguments

MODEL = read_saved_model(toy_arguments())
PAIRS = {pair.megatron_name: pair for pair in expand(select_family(MODEL), MODEL)}
QKV, FC1 = (f"decoder.layers.1.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1"))


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("block_bytes", [1 << 19, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_as_the_layout_splits_them(tmp_path, monkeypatch, num_chunks, block_bytes, dtype):
    monkeypatch.setattr(row_copy, "BLOCK_BYTES", block_bytes)
    directory = write_toy_checkpoint(tmp_path / "in", toy_llama_tensors(), num_chunks=num_chunks, is_cut_by_rows=True)
    reader, pair = TorchDistReader(directory), PAIRS[QKV]
    shards = plan_shards(dict(zip(pair.hf_names, pair.hf_shapes, strict=True)), dtype=dtype, max_shard_bytes=10**6)
    parts = pair.layout.split(reader.read(QKV).to(dtype), MODEL)
    with ShardWriter(tmp_path, shards) as writer, ExitStack() as files:
        rows = find_stored_rows(reader, QKV, files)
        assert rows is not None
        assert len(rows) == num_chunks
        for name, part, runs in zip(pair.hf_names, parts, find_row_runs(pair, MODEL), strict=True):
            place = writer.take(name, tuple(part.shape), dtype)
            result = copy_rows(rows, runs, place, stored_dtype=torch.float32, dtype=dtype)
            assert (result.is_finite, result.is_equal) == (True, True)
            assert place.holds(part.contiguous())


@pytest.mark.parametrize("damage", ["column", "gap", "stack", "surplus"])
def test_rows_that_are_not_stored_in_one_piece_are_not_found(tmp_path, damage):
    """Cut along columns, with a piece missing, several layers in one piece, or more rows than the tensor has."""
    directory = write_toy_checkpoint(
        tmp_path,
        toy_llama_tensors(),
        num_chunks=1 if damage == "stack" else 2,
        is_cut_by_rows=damage in ("gap", "surplus"),
    )
    reader = TorchDistReader(directory)
    if damage == "gap":
        key = "decoder.layers.self_attention.linear_qkv.weight"
        chunks = reader.store.tensors[key].chunks
        whole = tuple(chunk for chunk in chunks if chunk.offsets != (1, 20, 0))
        reader.store.tensors[key] = dataclasses.replace(reader.store.tensors[key], chunks=whole)
    if damage == "surplus":
        key = "decoder.layers.self_attention.linear_qkv.weight"
        stored = reader.store.tensors[key]
        reader.store.tensors[key] = dataclasses.replace(stored, shape=(stored.shape[0], 39, stored.shape[2]))
    with ExitStack() as files:
        assert find_stored_rows(reader, QKV, files) is None


def test_a_file_that_ends_too_soon_is_an_error(tmp_path):
    reader = TorchDistReader(write_toy_checkpoint(tmp_path, toy_llama_tensors(), num_chunks=1, is_cut_by_rows=True))
    shards = plan_shards({"a": (24,)}, dtype=torch.float32, max_shard_bytes=10**6)
    with ShardWriter(tmp_path, shards) as writer, ExitStack() as files:
        (rows,) = find_stored_rows(reader, "decoder.final_layernorm.weight", files) or []
        cut_short = dataclasses.replace(rows, start=(tmp_path / "iter_0000010" / "__0_0.distcp").stat().st_size * 9)
        place = writer.take("a", (24,), torch.float32)
        with pytest.raises(EOFError, match="96 bytes are missing"):
            copy_rows([cut_short], [(0, 24)], place, stored_dtype=torch.float32, dtype=torch.float32)
