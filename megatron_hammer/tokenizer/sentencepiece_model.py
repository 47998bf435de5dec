"""What a SentencePiece `.model` file holds, read from its protobuf bytes without a protobuf library.

The sentencepiece package encodes, but does not say which pieces are user-defined nor how text is normalised.
Field numbers: google/sentencepiece src/sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megatron_hammer.errors import DataError

_MODEL_TYPE_NAMES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePieceModel:
    """Pieces by id, and the settings that change how text is encoded."""

    pieces: tuple[Piece, ...]
    model_type: str
    has_byte_fallback: bool
    treats_whitespace_as_suffix: bool
    precompiled_charsmap: bytes  # empty: the identity
    has_dummy_prefix: bool
    removes_extra_whitespaces: bool
    escapes_whitespaces: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `.model` file; raises DataError if it cannot be read or is not one."""
    try:
        return _parse_model(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: tokenizer cannot be read ({error.strerror}). Check the path.") from error
    except (IndexError, KeyError, ValueError, struct.error, TypeError) as error:
        raise DataError(
            f"{path}: file must be a SentencePiece model, got something else. Pass a .model file."
        ) from error


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in _read_fields(data):
        if number == 1:
            fields = dict(_read_fields(value))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            pieces.append(Piece(fields[1].decode("utf-8"), score, PieceType(fields.get(3, 1))))
        elif number == 2:
            trainer = dict(_read_fields(value))
        elif number == 3:
            normalizer = dict(_read_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_MODEL_TYPE_NAMES[trainer.get(3, 1)],
        has_byte_fallback=bool(trainer.get(35, 0)),
        treats_whitespace_as_suffix=bool(trainer.get(24, 0)),
        precompiled_charsmap=normalizer.get(2, b""),
        has_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_whitespaces=bool(normalizer.get(4, 1)),
        escapes_whitespaces=bool(normalizer.get(5, 1)),
    )


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of one protobuf message: varints as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            num_bytes, position = _read_varint(data, position)
        else:
            num_bytes = {1: 8, 5: 4}[wire_type]
        if position + num_bytes > len(data):
            raise ValueError("truncated")
        yield number, data[position : position + num_bytes]
        position += num_bytes


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
