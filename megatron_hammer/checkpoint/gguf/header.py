"""What a GGUF file says of itself, without its arrays and tensors.

The package gguf reads every token of the vocabulary into objects of Python: for 105,789 tokens that is seconds, here it
is a fraction of one. Source: the specification of GGUF, version 3 (ggml, docs/gguf.md).
"""

import struct
from io import SEEK_CUR
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hammer.errors import ConversionError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has 32-bit lengths, and llama.cpp refuses it
_FORMATS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by the type's number
_TEXT, _ARRAY = 8, 9
_LONGEST_TEXT_BYTES = 1 << 26  # a damaged length must not become an allocation


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Every number and text of the metadata by its name, such as `llama.context_length`; arrays are left out.

    Raises ConversionError if the file cannot be read, is not GGUF, or ends too early.
    """
    try:
        with path.open("rb") as file:
            if (magic := file.read(4)) != _MAGIC:
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
            entries = ((_read_text(file), _read_value(file, _read_number(file, "<I"))) for _ in range(num_entries))
            return {name: value for name, value in entries if value is not None}
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


def _read_value(file: BinaryIO, kind: int) -> Any:
    """A number or text; None of an array, which is passed over."""
    if kind == _TEXT:
        return _read_text(file)
    if kind != _ARRAY:
        return _read_number(file, _FORMATS[kind])
    kind, length = struct.unpack("<IQ", file.read(12))
    if kind == _TEXT:
        for _ in range(length):
            file.seek(_read_number(file, "<Q"), SEEK_CUR)
    else:
        file.seek(length * struct.calcsize(_FORMATS[kind]), SEEK_CUR)
    return None
