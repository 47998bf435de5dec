"""Moves every weight of a Hugging Face folder into a checkpoint, and proves each one as soon as it is written.

The inverse of weight_export.py. Each tensor is checked while its source is still in memory, so nothing is read from
disk twice. Memory for one tensor, or for one box of a tensor whose rows only move.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_hammer.checkpoint.convert.proofs import compare_tensors, list_faults, stacks_rows
from megatron_hammer.checkpoint.hugging_face.folder import HfFolder
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import StackedName, extra_state_key, stack_name
from megatron_hammer.checkpoint_files.torch_dist.writer import CheckpointWriter
from megatron_hammer.errors import ConversionError

# Weights are cut into boxes of at most this: the box, its source and what is read back are in memory at once.
MAX_CHUNK_BYTES = 256 << 20

Prove = Callable[[], list[str]]  # returns a sentence for each thing that is wrong


def write_verified_weights(
    source: HfFolder,
    dtypes: dict[str, torch.dtype],
    writer: CheckpointWriter,
    on_parameters: Callable[[int, int], None],
) -> CheckRow:
    """Write every tensor of the folder. dtypes: by key of the checkpoint. `on_parameters(done, total)` counts them.

    Raises ConversionError naming every tensor that is not finite, or that did not read back equal.
    """
    model = source.model.shape
    num_experts = model.moe.num_experts if model.moe else 0
    has_layer_axis = not model.is_mixed
    axis_sizes = (model.num_layers, num_experts) if has_layer_axis else (num_experts,)
    objects = {}
    for pair in source.pairs:
        stacked = _stack(pair, source)
        # Layer 0 of a stack is declared with the shape of all layers; the others find it there.
        if not any(stacked.indices):  # the first of its stack
            shape = (*axis_sizes[: len(stacked.indices)], *pair.megatron_shape)
            writer.declare(stacked.key, shape, dtypes[stacked.key])
        state = extra_state_key(
            pair.megatron_name,
            num_layers=model.num_layers,
            num_experts=num_experts,
            has_layer_axis=has_layer_axis,
        )
        objects[state] = [None]
    problems = source.list_unequal_duplicates()
    total = sum(pair.num_elements for pair in source.pairs)
    done = 0
    pending: Future[list[str]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:  # proves one box while the next is written
        for pair in source.pairs:
            for prove in _write_pair(pair, source, dtypes, writer):
                problems += pending.result() if pending else []
                pending = pool.submit(prove)
            done += pair.num_elements
            on_parameters(done, total)
        problems += pending.result() if pending else []
    # After the loop, so that all tensors with NaN are named in one run.
    if problems:
        raise ConversionError(*problems)
    for key, value in objects.items():
        if key is not None:
            writer.write_object(key, value)
    num_parts = sum(len(pair.hf_names) for pair in source.pairs)
    return CheckRow("tensors read back and split again", f"all {num_parts:,} equal, bit for bit", True)


def _write_pair(
    pair: TensorPair, source: HfFolder, dtypes: dict[str, torch.dtype], writer: CheckpointWriter
) -> Iterator[Prove]:
    """Write one Megatron tensor; yields functions that read it back, split it again and compare it with its source."""
    stacked = _stack(pair, source)
    dtype = dtypes[stacked.key]
    model = source.model.shape
    if stacks_rows(pair, model):
        yield from _write_rows(pair, source, dtype, writer)
        return
    # Converted before the merge, so that the proof compares numbers of the written dtype.
    parts = [source.read(name).to(dtype) for name in pair.hf_names]
    offsets = (*stacked.indices, *([0] * len(pair.megatron_shape)))
    _write_box(writer, stacked.key, offsets, len(stacked.indices), pair.layout.merge(parts, model))

    def prove() -> list[str]:
        # From the file, not from the tensor in memory: a full disk or a broken one is noticed here.
        written = writer.read_chunk(stacked.key, offsets).view(pair.megatron_shape)
        return _list_faults(pair, pair.hf_names, parts, pair.layout.split(written, model), source, writer)

    yield prove


def _write_rows(pair: TensorPair, source: HfFolder, dtype: torch.dtype, writer: CheckpointWriter) -> Iterator[Prove]:
    """The same for parts that lie one under the other: nothing is merged, and a large part is written box by box."""
    stacked = _stack(pair, source)
    num_stacked, row = len(stacked.indices), 0
    for name in pair.hf_names:
        for piece in _split_rows(source.read(name), dtype):
            part = piece.to(dtype)
            offsets = (*stacked.indices, row, *([0] * (part.dim() - 1)))
            _write_box(writer, stacked.key, offsets, num_stacked, part)
            yield functools.partial(_prove_rows, pair, name, part, offsets, source, writer)
            row += len(part)


def _prove_rows(
    pair: TensorPair,
    name: str,
    part: Tensor,
    offsets: Sequence[int],
    source: HfFolder,
    writer: CheckpointWriter,
) -> list[str]:
    written = writer.read_chunk(_stack(pair, source).key, offsets).view(part.shape)
    return _list_faults(pair, [name], [part], [written], source, writer)


def _stack(pair: TensorPair, source: HfFolder) -> StackedName:
    return stack_name(pair.megatron_name, has_layer_axis=not source.model.shape.is_mixed)


def _split_rows(tensor: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Views of at most MAX_CHUNK_BYTES each, or of one row that is larger."""
    row_bytes = max(1, tensor[0].numel() * max(dtype.itemsize, tensor.dtype.itemsize))
    return tensor.split(max(1, MAX_CHUNK_BYTES // row_bytes))


def _write_box(writer: CheckpointWriter, key: str, offsets: Sequence[int], num_stacked: int, tensor: Tensor) -> None:
    writer.write_chunk(key, offsets, tensor.reshape((1,) * num_stacked + tensor.shape))


def _list_faults(
    pair: TensorPair,
    names: Sequence[str],
    parts: Sequence[Tensor],
    written: Sequence[Tensor],
    source: HfFolder,
    writer: CheckpointWriter,
) -> list[str]:
    return [
        fault
        for name, part, copy in zip(names, parts, written, strict=True)
        for fault in list_faults(
            name,
            compare_tensors(part, copy),
            dtype=part.dtype,
            source=source.folder,
            target=writer.directory,
            remedy="Fetch the folder again",
            written_as=pair.megatron_name,
        )
    ]
