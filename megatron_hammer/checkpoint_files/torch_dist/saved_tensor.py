"""Finds a tensor that torch.save wrote inside a file and views it where it lies: no copy, no code of the pickle.

torch.save writes a zip whose members are not compressed: `data.pkl` says dtype, shape and strides, `data/0` is the
storage. The pickle is read by an unpickler that builds only inert records, and must have the dtype and the shape of the
checkpoint's metadata. Everything else is left to `torch.load(weights_only=True)`.
"""

import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import IO, Any, cast

import torch
from torch import Tensor

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 1 << 16  # of one tensor; real ones have less than 300
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def find_saved_tensor(
    file: FileIO, *, offset: int, length: int, shape: Sequence[int], dtype: torch.dtype
) -> int | None:
    """The byte of `file` at which the elements of the tensor begin that torch.save wrote to [offset, offset + length).

    None if it is compressed, strided, big-endian, or of another dtype or shape.
    """
    if sys.byteorder != "little":
        return None
    first_byte = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        # zipfile finds the archive from its end, so bytes of other tensors before it do no harm.
        mapped = _SeekableMap(file.fileno(), offset + length - first_byte, access=mmap.ACCESS_READ, offset=first_byte)
        start = _find_storage(mapped, shape, dtype)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
    ):
        return None  # torch.load says what is wrong
    # A start before `offset` belongs to another tensor of the file.
    return None if start is None or first_byte + start < offset else first_byte + start


def map_tensor(file: FileIO, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The elements at byte `start` of `file` as a view of it; its memory map ends with the last tensor that uses it.

    Writing to the tensor changes a private copy, not the file. Elements that do not lie on a multiple of their size,
    as most of megatron's do not, are read into memory instead: not every kernel of torch takes them as they are.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or start % dtype.itemsize:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        read_into(file, start, tensor)
        return tensor
    first_byte = start - start % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file.fileno(), start + num_bytes - first_byte, access=mmap.ACCESS_COPY, offset=first_byte)
    return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=start - first_byte).view(tuple(shape))


def read_into(file: FileIO, start: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes at `start`; raises EOFError if the file ends before."""
    buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while buffer:
        # One call may read less than it is asked for: Linux stops at 2 GiB. preadv: other threads read the same file.
        num_read = os.preadv(file.fileno(), [buffer], start)
        if not num_read:
            raise EOFError(f"{len(buffer)} bytes are missing")
        buffer, start = buffer[num_read:], start + num_read


def _find_storage(mapped: "_SeekableMap", shape: Sequence[int], dtype: torch.dtype) -> int | None:
    """Where the elements begin in `mapped`; None if they are not a plain array of that shape and dtype."""
    with zipfile.ZipFile(cast(IO[bytes], mapped)) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        description, byte_order = members["data.pkl"], members.get("byteorder")
        if description.file_size > _MAX_PICKLE_BYTES or (byte_order and archive.read(byte_order) != b"little"):
            return None
        found = _DescriptionUnpickler(archive.open(description)).load()
    if not isinstance(found, _Description) or not found.is_plain(shape, dtype):
        return None
    storage = members[f"data/{found.storage.key}"]
    needed_bytes = math.prod(shape) * dtype.itemsize
    if storage.compress_type != zipfile.ZIP_STORED or storage.file_size < needed_bytes:
        return None
    # From the local header: torch pads its extra field to align the data, and the central directory, which zipfile
    # reads, does not have that padding.
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(mapped, storage.header_offset)
    start = storage.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    is_inside = signature == _LOCAL_SIGNATURE and start + needed_bytes <= len(mapped)
    return start if is_inside else None


class _SeekableMap(mmap.mmap):
    """What zipfile asks for and mmap has only from Python 3.13."""

    def seekable(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass(frozen=True, slots=True)
class _Description:
    """What `torch._utils._rebuild_tensor_v2` would be called with."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def is_plain(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether it is an array of that shape and dtype, row after row, at the beginning of its storage."""
        strides, elements = [], 1
        for size in reversed(shape):
            strides.append(elements)
            elements *= size
        has_strides = all(
            # The stride of an axis of one element is never used and may be anything.
            size == 1 or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, reversed(strides), strict=False)
        )
        return (
            isinstance(self.storage, _Storage)
            and self.storage.dtype == dtype
            and self.offset == 0
            and self.shape == tuple(shape)
            and len(self.strides) == len(self.shape)
            and has_strides
        )


def _describe(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Description:
    return _Description(storage, offset, tuple(shape), tuple(strides))


class _DescriptionUnpickler(pickle.Unpickler):
    """Builds a `_Description` and nothing else, whatever the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict  # of the backward hooks, which are empty
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"{kind} is no storage of a plain tensor")
        return _Storage(dtype, key)
