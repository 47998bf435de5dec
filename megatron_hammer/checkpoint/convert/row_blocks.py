"""Copies a tensor whose layout only reorders rows from file to file, block by block, and proves each block.

`proofs.find_row_runs` says which rows go where. The rest is copying bytes. A block stays in the processor's cache while
it is read, checked, written, read back and compared, so this costs little more than `cp`. Tensors that the layout
transposes, or that are cut along their columns, are moved whole by `weight_export.py`.
"""

import math
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO

import torch
from torch import Tensor

from megatron_hammer.checkpoint.convert.proofs import TensorProof
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint_files.safetensors.shard_writer import WrittenTensor, write_at
from megatron_hammer.checkpoint_files.torch_dist.reader import TorchDistReader
from megatron_hammer.checkpoint_files.torch_dist.saved_tensor import read_into

BLOCK_BYTES = 1 << 19


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Consecutive rows [first_row, first_row + num_rows) of a tensor, stored from byte `start` of `file`."""

    first_row: int
    num_rows: int
    row_bytes: int
    file: FileIO
    start: int

    def overlap(self, first_row: int, num_rows: int) -> "RowRange | None":
        """The part of these rows that lies in [first_row, first_row + num_rows); None if there is none."""
        first = max(first_row, self.first_row)
        num_shared = min(first_row + num_rows, self.first_row + self.num_rows) - first
        start = self.start + (first - self.first_row) * self.row_bytes
        return replace(self, first_row=first, num_rows=num_shared, start=start) if num_shared > 0 else None


def find_stored_rows(reader: TorchDistReader, name: str, files: ExitStack) -> list[RowRange] | None:
    """Where the rows of a tensor lie, in order; the files are opened for `files` to close.

    None if the rows are not stored uncompressed, contiguous and whole.
    """
    stored = reader.tensors[name]
    num_leading = len(stored.offsets) - len(stored.shape)
    leading, row_shape = stored.offsets[:num_leading], stored.shape[1:]
    ranges = []
    for chunk in reader.store.list_chunks(stored.key, leading):
        # A chunk that is cut along the columns holds only a part of every row, so its bytes cannot be copied in order.
        is_whole = chunk.sizes == (*[1] * num_leading, chunk.sizes[num_leading], *row_shape)
        file = files.enter_context(FileIO(reader.directory / reader.store.file_of(stored.key, chunk)))
        start = reader.store.find_chunk_start(file, stored.key, chunk) if is_whole else None
        if start is None:
            return None
        ranges.append(
            RowRange(
                first_row=chunk.offsets[num_leading],
                num_rows=chunk.sizes[num_leading],
                row_bytes=math.prod(row_shape) * stored.dtype.itemsize,
                file=file,
                start=start,
            )
        )
    ranges.sort(key=lambda rows: rows.first_row)
    ends = [0, *(rows.first_row + rows.num_rows for rows in ranges)]
    # All stored rows, not those of stored.shape: the padding of the vocabulary is stored and not part of the tensor.
    num_rows = reader.store.tensors[stored.key].shape[num_leading]
    is_gapless = [rows.first_row for rows in ranges] == ends[:-1] and ends[-1] == num_rows
    return ranges if is_gapless else None


# Two threads copy at once (weight_export.py), so they must not share a buffer.
class _Blocks(threading.local):
    """Two buffers for each thread, used again for every block."""

    def __init__(self) -> None:
        self.read, self.read_back = (torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(2))


_blocks = _Blocks()


def copy_rows(
    source: Sequence[RowRange],
    runs: Sequence[tuple[int, int]],
    target: WrittenTensor,
    *,
    stored_dtype: torch.dtype,
    dtype: torch.dtype,
) -> TensorProof:
    """Write the rows of `runs`, one after the other, to `target` in `dtype`, and compare what the file then holds.

    source: every row of the tensor once, in order. Raises EOFError if a file ends before its rows do.
    """
    position, are_finite = target.start, True
    for rows in (rows for run in runs for held in source if (rows := held.overlap(*run))):
        first_byte, left = rows.start, rows.num_rows * rows.row_bytes // stored_dtype.itemsize
        while left:
            # One buffer holds the stored dtype and the other the written dtype: a block must fit into both.
            num_elements = min(left, BLOCK_BYTES // max(stored_dtype.itemsize, dtype.itemsize))
            block = _read(rows.file, first_byte, num_elements * stored_dtype.itemsize).view(stored_dtype).to(dtype)
            are_finite = are_finite and is_finite(block)
            # Positioned writes: several threads write into one file and share no file position.
            write_at(target.file, position, block)
            read_back = _blocks.read_back[: block.nbytes]
            is_whole = os.preadv(target.file.fileno(), [memoryview(read_back.numpy())], position) == block.nbytes
            if not is_whole or not is_bitwise_equal(read_back.view(dtype), block):
                return TensorProof(are_finite, False)
            first_byte += num_elements * stored_dtype.itemsize
            position += block.nbytes
            left -= num_elements
    return TensorProof(are_finite, True)


def _read(file: FileIO, start: int, num_bytes: int) -> Tensor:
    """The bytes at `start`, in this thread's buffer."""
    buffer = _blocks.read[:num_bytes]
    read_into(file, start, buffer)
    return buffer
