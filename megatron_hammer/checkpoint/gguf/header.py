"""What a GGUF file says of itself: numbers and texts, and the arrays that are asked for, without its tensors.

The package gguf reads every token of the vocabulary into objects of Python: for 105,789 tokens that is seconds, here it
is a fraction of one. Source: the specification of GGUF, version 3 (ggml, docs/gguf.md).
"""

import struct
from collections.abc import Collection
from io import SEEK_CUR
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hammer.errors import ConversionError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has 32-bit lengths, and llama.cpp refuses it
_FORMATS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by the type's number
_TEXT, _ARRAY = 8, 9
_LONGEST_TEXT_BYTES = 1 << 26  # a damaged length must not become an allocation


def read_gguf_header(path: Path, *, arrays: Collection[str] = ()) -> dict[str, Any]:
    """Every number and text of the metadata by its name, such as `llama.context_length`, and these arrays.

    Raises ConversionError if the file cannot be read, is not GGUF, or ends too early.
    """
    try:
        with path.open("rb") as file:
            if (magic := file.read(4)) != MAGIC:
                raise ConversionError(
                    f"{path}: must be a GGUF file, got first bytes {magic!r}. "
                    "Pass a .gguf file, a Hugging Face folder or a directory that training saved into."
                )
            version, _, num_entries = struct.unpack("<IQQ", file.read(20))
            if version not in _VERSIONS:
                raise ConversionError(
                    f"{path}: GGUF version must be {' or '.join(map(str, _VERSIONS))}, got {version}. "
                    "Convert the model again."
                )
            entries: dict[str, Any] = {}
            for _ in range(num_entries):
                name = _read_text(file)
                entries[name] = _read_value(file, _read_number(file, "<I"), with_array=name in arrays)
            return {name: value for name, value in entries.items() if value is not None}
    except OSError as error:
        raise ConversionError(f"{path}: must be a readable GGUF file, got: {error.strerror}.") from error
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise ConversionError(f"{path}: the header of the GGUF file is damaged or cut off. Copy it again.") from error


def _read_number(file: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _read_text(file: BinaryIO) -> str:
    length = _read_number(file, "<Q")
    if length > _LONGEST_TEXT_BYTES:
        raise ValueError(f"a text of {length} bytes")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("the file ends in a text")
    return content.decode()


def _read_value(file: BinaryIO, kind: int, *, with_array: bool) -> Any:
    """A number or text; an array as a list, or None of one that is passed over."""
    if kind == _TEXT:
        return _read_text(file)
    if kind != _ARRAY:
        return _read_number(file, _FORMATS[kind])
    kind, length = struct.unpack("<IQ", file.read(12))
    if kind == _TEXT:
        if with_array:
            return [_read_text(file) for _ in range(length)]
        for _ in range(length):
            file.seek(_read_number(file, "<Q"), SEEK_CUR)
        return None
    size = length * struct.calcsize(_FORMATS[kind])
    if with_array:
        if size > _LONGEST_TEXT_BYTES:
            raise ValueError(f"an array of {size} bytes")
        content = file.read(size)
        if len(content) < size:
            raise ValueError("the file ends in an array")
        return [value for (value,) in struct.iter_unpack(_FORMATS[kind], content)]
    file.seek(size, SEEK_CUR)
    return None
