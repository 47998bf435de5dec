"""Copies a safetensors file byte for byte, except for rows put into some of its matrices; memory for one chunk.

The data is not decoded, so unchanged tensors keep every bit. Format: see header.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_hammer.checkpoint_files.safetensors.header import HeaderEntry, build_header, read_header
from megatron_hammer.errors import ConversionError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class InsertedRows:
    """The rows of a matrix from `first_row` on become `data`, row-major bytes; rows after these stay."""

    first_row: int
    num_rows: int
    data: memoryview


def copy_with_rows(source: Path, target: Path, inserted: Mapping[str, InsertedRows]) -> None:
    """Write `source` again with rows put into the matrices that `inserted` names; every other byte of data is equal."""
    tensors, metadata = read_header(source)
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(_build_header(tensors, metadata, inserted))
        for name, tensor in tensors.items():
            for chunk in _iterate_chunks(reader, tensor, inserted.get(name)):
                writer.write(chunk)


def list_different_tensors(source: Path, target: Path, inserted: Mapping[str, InsertedRows]) -> list[str]:
    """Names of tensors in `target` that are not what `copy_with_rows` writes, read back from both files."""
    tensors, _ = read_header(source)
    written, _ = read_header(target)
    if list(tensors) != list(written):
        return sorted(tensors.keys() ^ written.keys()) or list(tensors)
    different = []
    with source.open("rb") as reader, target.open("rb") as checked:
        for name, tensor in tensors.items():
            copy = written[name]
            checked.seek(copy.start)
            is_equal = copy.shape == _new_shape(tensor, inserted.get(name)) and copy.dtype == tensor.dtype
            for chunk in _iterate_chunks(reader, tensor, inserted.get(name)):
                is_equal = is_equal and checked.read(len(chunk)) == chunk
            if not is_equal:
                different.append(name)
    return different


def _iterate_chunks(
    reader: BinaryIO, tensor: HeaderEntry, inserted: InsertedRows | None
) -> Iterator[bytes | memoryview]:
    if inserted is None:
        yield from _read_range(reader, tensor.start, tensor.num_bytes)
        return
    # Rows of a row-major matrix lie one after the other, so a row is found without its dtype.
    row_bytes = tensor.num_bytes // tensor.shape[0]
    yield from _read_range(reader, tensor.start, inserted.first_row * row_bytes)
    for start in range(0, len(inserted.data), CHUNK_BYTES):
        yield inserted.data[start : start + CHUNK_BYTES]
    last_row = inserted.first_row + inserted.num_rows
    if last_row < tensor.shape[0]:
        yield from _read_range(reader, tensor.start + last_row * row_bytes, (tensor.shape[0] - last_row) * row_bytes)


def _read_range(reader: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    reader.seek(start)
    while num_bytes:
        chunk = reader.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise ConversionError(f"{reader.name}: weights end early. Something else writes this file; try again.")
        num_bytes -= len(chunk)
        yield chunk


def _new_shape(tensor: HeaderEntry, inserted: InsertedRows | None) -> tuple[int, ...]:
    if inserted is None:
        return tensor.shape
    return (max(tensor.shape[0], inserted.first_row + inserted.num_rows), *tensor.shape[1:])


def _build_header(
    tensors: Mapping[str, HeaderEntry], metadata: Mapping[str, str], inserted: Mapping[str, InsertedRows]
) -> bytes:
    described = []
    for name, tensor in tensors.items():
        shape = _new_shape(tensor, inserted.get(name))
        grown_bytes = tensor.num_bytes if shape == tensor.shape else tensor.num_bytes // tensor.shape[0] * shape[0]
        described.append((name, tensor.dtype, shape, grown_bytes))
    return build_header(described, metadata)
