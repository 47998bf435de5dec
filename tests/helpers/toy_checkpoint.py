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

# Llama with no two sizes alike; 53 tokens padded to 64.
TOY_ARGUMENTS = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 20,
    "num_attention_heads": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 53,
    "padded_vocab_size": 64,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "bias_gelu_fusion": False,
    "position_embedding_type": "rope",
    "rotary_base": 10_000,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "embedding_norm": False,
    "init_method_std": 0.02,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "num_experts": None,
    "tokenizer_model": None,
    "preset": "toy",
    "seq_length": 16,
    "global_batch_size": 8,
    "consumed_train_samples": 80,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "cosine",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "seed": 1234,
}
MOE_ARGUMENTS = {
    "num_experts": 5,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 12,  # transformers' grouped matrix product wants rows of a multiple of 16 bytes
    "moe_shared_expert_intermediate_size": 9,
    "moe_shared_expert_gate": True,
    "moe_aux_loss_coeff": 0.01,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
}
GPT2_ARGUMENTS = {
    "group_query_attention": False,
    "normalization": "LayerNorm",
    "swiglu": False,
    "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}


def toy_arguments(**changes: Any) -> Namespace:
    return Namespace(**(TOY_ARGUMENTS | changes))


def toy_llama_tensors(*, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random weights for TOY_ARGUMENTS under the keys of torch_dist: layers stacked, vocabulary padded."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.word_embeddings.weight": (64, 24),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 24),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 40, 24),
        "decoder.layers.self_attention.linear_proj.weight": (3, 24, 24),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 24),
        "decoder.layers.mlp.linear_fc1.weight": (3, 40, 24),
        "decoder.layers.mlp.linear_fc2.weight": (3, 24, 20),
        "decoder.final_layernorm.weight": (24,),
        "output_layer.weight": (64, 24),
        "optimizer.state.exp_avg.output_layer.weight": (64, 24),
    }
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


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
