"""What a SentencePiece `.model` file holds: read, and written again after an edit.

The sentencepiece package encodes, but does not say which pieces are user-defined nor how text is normalised. The file
is a protobuf message whose definition that package ships. Models are trained by train.py and extended by
merge_vocabularies.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import begins_with
from megatron_hammer.files.read import read_bytes

WHITESPACE_SYMBOL = "\u2581"  # how pieces spell a space
# A level of sentencepiece's own log. It would warn of the piece for NUL, which HammerLLM has, in every process.
SENTENCEPIECE_LOGS_ERRORS_ONLY = 2
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

    @property
    def surface(self) -> str:
        """What the piece stands for in a text."""
        return self.text.replace(WHITESPACE_SYMBOL, " ")


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePieceModel:
    """Pieces by id, the settings that change how text is encoded, and what it had to hold when it was trained.

    specs: the serialised message without its pieces, which keeps every setting that has no field here.
    To change the pieces, use `dataclasses.replace(model, pieces=...)`.
    """

    pieces: tuple[Piece, ...]
    specs: bytes
    model_type: str
    has_byte_fallback: bool
    treats_whitespace_as_suffix: bool
    precompiled_charsmap: bytes  # empty: the identity
    has_dummy_prefix: bool
    removes_extra_whitespaces: bool
    escapes_whitespaces: bool
    required_chars: str

    @property
    def unknown_piece(self) -> str | None:
        return next((piece.text for piece in self.pieces if piece.type is PieceType.UNKNOWN), None)


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `.model` file; raises DataError if it cannot be read or is not one."""
    content = read_bytes(path)
    try:
        return parse_sentencepiece_model(content)
    except (DecodeError, ValueError) as error:
        raise DataError(
            f"{path}: file must be a SentencePiece model, got something else. Pass a .model file."
        ) from error


def is_sentencepiece_model(path: Path) -> bool:
    """Whether the file is such a model, which may replace an older one."""
    # The first field of the message, so that a large file of another kind is not read.
    if not begins_with(b"\n")(path):
        return False
    try:
        read_sentencepiece_model(path)
    except DataError:
        return False
    return True


def parse_sentencepiece_model(data: bytes) -> SentencePieceModel:
    """Return the model that `data` holds; raises DecodeError or ValueError if it is not one."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    types = {int(piece_type): piece_type for piece_type in PieceType}  # the enum's own look-up takes twice as long
    pieces = tuple(Piece(piece.piece, piece.score, types[piece.type]) for piece in proto.pieces)
    # Any file whose bytes happen to parse as a message would be taken for an empty model.
    if not pieces or not all(piece.text and isinstance(piece.text, str) for piece in pieces):
        raise ValueError("no pieces, an empty one, or one that is not UTF-8 (protobuf returns it as bytes)")
    # What is left is a few kilobytes, in every field that this class does not name.
    del proto.pieces[:]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return SentencePieceModel(
        pieces=pieces,
        specs=proto.SerializeToString(deterministic=True),
        model_type=_MODEL_TYPE_NAMES[trainer.model_type],
        has_byte_fallback=trainer.byte_fallback,
        treats_whitespace_as_suffix=trainer.treat_whitespace_as_suffix,
        precompiled_charsmap=normalizer.precompiled_charsmap,
        has_dummy_prefix=normalizer.add_dummy_prefix,
        removes_extra_whitespaces=normalizer.remove_extra_whitespaces,
        escapes_whitespaces=normalizer.escape_whitespaces,
        required_chars=trainer.required_chars,
    )


def serialize_sentencepiece_model(model: SentencePieceModel) -> bytes:
    """Return the bytes of the `.model` file: `model.pieces` with the settings in `model.specs`.

    Exact inverse of `parse_sentencepiece_model` for every file that sentencepiece wrote.
    The fields of `model` other than these two describe `specs` and are not written.
    """
    # From the stored settings and not from the fields: a setting that has no field here would be lost.
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.specs)
    proto.pieces.extend(_build_piece_messages(model.pieces))
    return proto.SerializeToString(deterministic=True)


def _build_piece_messages(pieces: Iterable[Piece]) -> list[sentencepiece_model_pb2.ModelProto.SentencePiece]:
    """Sentencepiece writes the score always, and the type only where it is not the default."""
    build = sentencepiece_model_pb2.ModelProto.SentencePiece
    return [
        build(piece=piece.text, score=piece.score)
        if piece.type is PieceType.NORMAL
        else build(piece=piece.text, score=piece.score, type=int(piece.type))
        for piece in pieces
    ]


def set_trainer_settings(data: bytes, **settings: int | str | bool) -> bytes:
    """Return the bytes of a model with some fields of its trainer_spec replaced; the pieces stay as they are."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    for name, value in settings.items():
        setattr(proto.trainer_spec, name, value)
    return proto.SerializeToString(deterministic=True)
