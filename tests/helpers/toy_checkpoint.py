"""A torch_dist checkpoint written by hand: what Megatron writes, without running it, and any damage a test needs."""

import io
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.helpers.toy_model import draw_weights, stack_layers, toy_arguments


def toy_llama_tensors(*, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random weights of the toy Llama under the keys of torch_dist, and one tensor of the optimizer."""
    tensors = stack_layers(draw_weights(dtype=dtype, seed=seed))
    return tensors | {"optimizer.state.exp_avg.output_layer.weight": tensors["output_layer.weight"].flip(0)}


def write_toy_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    arguments: Namespace | None = None,
    iteration: int = 10,
    num_chunks: int = 2,
    common_state: Any = None,
    is_cut_by_rows: bool = False,
) -> Path:
    """Write `directory/iter_<iteration>` and the tracker file; every tensor is cut into chunks along its first and
    its last axis, or only along the rows of each layer, which lie in two files by turns. Returns the iteration's
    directory.
    """
    target = directory / f"iter_{iteration:07d}"
    target.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (target / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    files = {f"__{rank}_0.distcp": io.BytesIO() for rank in range(2)}
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}

    def store(index: MetadataIndex, value: Any) -> None:
        name = list(files)[len(storage) % 2]
        data = io.BytesIO()
        torch.save(value, data)
        storage[index] = _StorageInfo(name, files[name].tell(), data.tell())
        files[name].write(data.getvalue())

    for key, tensor in tensors.items():
        chunks = []
        is_stacked = key.startswith("decoder.layers.")
        pieces = cut_rows(tensor, num_chunks, is_stacked) if is_cut_by_rows else cut(tensor, num_chunks)
        for offsets, chunk in pieces:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
            store(MetadataIndex(key, torch.Size(offsets)), chunk.clone())
        entries[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    state = {"args": arguments or toy_arguments(), "iteration": iteration, "checkpoint_version": 3.0}
    store(MetadataIndex("common_state/shard_0_1"), [state if common_state is None else common_state])
    entries["common_state/shard_0_1"] = BytesStorageMetadata()
    (target / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    for name, file in files.items():
        (target / name).write_bytes(file.getvalue())
    return target


def cut(tensor: Tensor, num_chunks: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """Chunks with their offsets: along the first axis, and those along the last one."""
    pieces = []
    first = 0
    for rows in tensor.chunk(num_chunks):
        last = 0
        for piece in rows.chunk(num_chunks, dim=-1) if tensor.dim() > 1 else [rows]:
            offsets = [0] * tensor.dim()
            offsets[0] = first
            if tensor.dim() > 1:
                offsets[-1] = last
            pieces.append((tuple(offsets), piece))
            last += piece.shape[-1]
        first += rows.shape[0]
    return pieces


def cut_rows(tensor: Tensor, num_chunks: int, is_stacked: bool) -> list[tuple[tuple[int, ...], Tensor]]:
    """Chunks with their offsets, last rows first: whole rows of one layer, as column-parallel ranks write them."""
    layers = tensor.split(1) if is_stacked else [tensor]
    pieces = []
    for layer, rows in enumerate(layers):
        first = 0
        for piece in rows.chunk(num_chunks, dim=1 if is_stacked else 0):
            offsets = (layer, first) if is_stacked else (first,)
            pieces.append(((*offsets, *[0] * (tensor.dim() - len(offsets))), piece))
            first += piece.shape[1 if is_stacked else 0]
    return pieces[::-1]
