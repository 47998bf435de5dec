"""Moves every weight from a checkpoint into safetensors shards, and proves each one as soon as it is written.

See proofs.py. Most tensors are copied row by row (row_blocks.py). The others are moved whole, with at most two of them
in memory, and only one if it is large.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from megatron_hammer.checkpoint.convert.proofs import TensorProof, find_row_runs, join_proofs, list_faults
from megatron_hammer.checkpoint.convert.row_blocks import copy_rows, find_stored_rows
from megatron_hammer.checkpoint.hugging_face.tensor_rows import TensorPair
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint_files.checkpoint_reader import CheckpointReader
from megatron_hammer.checkpoint_files.safetensors.shard_writer import ShardFile, ShardWriter
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape

_NUM_THREADS = 2  # more threads would compete for one disk, and each needs memory
_MAX_SHARED_BYTES = 192 << 20
_large_tensor = threading.Lock()  # at most one larger tensor is in memory


def write_verified_weights(
    directory: Path,
    shards: Sequence[ShardFile],
    pairs: Sequence[TensorPair],
    model: ModelShape,
    reader: CheckpointReader,
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None],
) -> None:
    """Write every tensor of `pairs` in `dtype`; `on_tensor(done, total)` is told of each one.

    Raises one ConversionError that names every tensor with NaN or infinity, or that did not read back equal.
    """
    problems: list[str] = []
    with ShardWriter(directory, shards) as writer, ThreadPoolExecutor(_NUM_THREADS) as pool:
        jobs = [pool.submit(_write_pair, writer, pair, model, reader, dtype) for pair in _from_both_ends(pairs)]
        try:
            for num_done, job in enumerate(jobs, start=1):
                problems.extend(job.result())
                on_tensor(num_done, len(pairs))
        except BaseException:
            # Leaving the `with` block alone would wait until every queued tensor is written.
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise ConversionError(*problems)


def _from_both_ends[T](items: Sequence[T]) -> Iterator[T]:
    """First, last, second, last but one: two threads then seldom write to the same file, which would lock it."""
    first, last = 0, len(items) - 1
    while first <= last:
        yield items[first]
        if first < last:
            yield items[last]
        first, last = first + 1, last - 1


def _write_pair(
    writer: ShardWriter, pair: TensorPair, model: ModelShape, reader: CheckpointReader, dtype: torch.dtype
) -> list[str]:
    """Write one Megatron tensor as its Hugging Face tensors; returns a sentence for each thing wrong with it."""
    dtype = torch.float32 if pair.is_buffer else dtype
    proof = _copy_rows_of(writer, pair, model, reader, dtype) or _write_whole(writer, pair, model, reader, dtype)
    return list_faults(
        pair.megatron_name,
        proof,
        dtype=dtype,
        source=reader.directory,
        target=writer.directory,
        remedy="Export an earlier iteration",
    )


def _copy_rows_of(
    writer: ShardWriter, pair: TensorPair, model: ModelShape, reader: CheckpointReader, dtype: torch.dtype
) -> TensorProof | None:
    """Copy it row by row. Returns None, with nothing written, if its layout or its storage does not allow that."""
    if not isinstance(reader, TorchDistReader):
        return None
    # Row runs read a part of a chunk. A legacy checkpoint has no chunks, and its reader merges whole tensors.
    runs = find_row_runs(pair, model)
    if runs is None:
        return None
    with ExitStack() as files:
        rows = find_stored_rows(reader, pair.megatron_name, files)
        if rows is None:
            return None
        stored_dtype = reader.tensors[pair.megatron_name].dtype
        targets = [writer.take(*named, dtype) for named in zip(pair.hf_names, pair.hf_shapes, strict=True)]
        return join_proofs(
            copy_rows(rows, part_runs, target, stored_dtype=stored_dtype, dtype=dtype)
            for part_runs, target in zip(runs, targets, strict=True)
        )


def _write_whole(
    writer: ShardWriter, pair: TensorPair, model: ModelShape, reader: CheckpointReader, dtype: torch.dtype
) -> TensorProof:
    """Write it through the layout, and prove it with the inverse layout."""
    # Small tensors may be in memory twice, once per thread. Of two large ones the second waits for the first.
    is_large = pair.num_elements * dtype.itemsize > _MAX_SHARED_BYTES
    with _large_tensor if is_large else nullcontext():
        source = reader.read(pair.megatron_name).to(dtype)
        parts = [part.contiguous() for part in pair.layout.split(source, model)]
        written = [writer.write(hf_name, part) for hf_name, part in zip(pair.hf_names, parts, strict=True)]
        is_on_disk = all(place.holds(part) for place, part in zip(written, parts, strict=True))
        is_equal = is_on_disk and is_bitwise_equal(pair.layout.merge(parts, model), source)
        return TensorProof(is_finite(source), is_equal)
