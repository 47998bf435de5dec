"""The header of a safetensors file: where each tensor lies, read and written.

Format: eight bytes of header length, a JSON header of {name: dtype, shape, data_offsets}, then the data. Source:
github.com/huggingface/safetensors, README "Format".
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConversionError

_ALIGNMENT_BYTES = 8  # the data begins at a multiple of it, as safetensors itself writes it
_MAX_NUMBER = 1 << 62  # of bytes or elements
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeaderEntry:
    """Where a tensor lies: `start` counts bytes from the beginning of the file. dtype: as safetensors spells it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """The tensors of a file by name, in the order of their bytes, and its metadata.

    Raises ConversionError if the file is not a complete safetensors file.
    """
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError("a header beyond safetensors' limit")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        metadata = header.pop(_METADATA, {})
        data_start = 8 + header_bytes
        # A JSON object has no order that the format defines, and reading by offset goes through the file once.
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {
            name: HeaderEntry(
                path=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=data_start + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries
        }
        _require_tiles(entries, path.stat().st_size - data_start)
    except OSError as error:
        raise ConversionError(f"{path}: weights cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error) as error:
        raise ConversionError(
            f"{path}: file must be complete safetensors, got {error}. Fetch it again; it may be truncated."
        ) from error
    return tensors, metadata


def _require_tiles(entries: list[tuple[str, Any]], num_data_bytes: int) -> None:
    """The format allows neither holes nor overlaps: every tensor begins where the one before it ends."""
    position = 0
    for name, entry in entries:
        numbers = [*entry["data_offsets"], *entry["shape"]]
        if strange := [value for value in numbers if type(value) is not int or not 0 <= value < _MAX_NUMBER]:
            raise ValueError(f"{str(strange[0])[:40]} in place of a size or an offset of {name}")
        start, end = entry["data_offsets"]
        if start != position or end < start:
            raise ValueError(f"{name} at bytes {start:,} to {end:,}, where the data before it ends at {position:,}")
        position = end
    if position != num_data_bytes:
        raise ValueError(f"{num_data_bytes:,} bytes where its header says {position:,}")


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file. tensors: (name, dtype, shape, bytes) of each, in the order of the data."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # The format allows spaces after the JSON.
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(encoded)) + encoded
