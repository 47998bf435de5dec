"""Character coverage: which share of a list of characters has a token of its own.

A character is covered where the vocabulary holds it as one token that stands for exactly this character. One that
is only part of longer tokens, or that is spelt in bytes, is not. How text is cut does not matter: Llama-2 puts a space
before each text, so it encodes no Chinese character to one token, although its vocabulary has tokens for 605 of the
3,500.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.errors import DataError
from megatron_hammer.files.typed import read_json, validate
from megatron_hammer.tokenizer.encoding.encoder import Encoder, SentencePieceEncoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    WHITESPACE_SYMBOL,
    PieceType,
    read_sentencepiece_model,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelCoverage:
    """How many of a level's characters have a token of their own."""

    level: str
    num_characters: int
    num_covered: int

    @property
    def covered_ratio(self) -> float:
        return self.num_covered / self.num_characters


def read_character_levels(path: Path) -> dict[str, tuple[str, ...]]:
    """Read `{"level": {"texts": ["一", ...]}, ...}` (or a plain list of characters a level), in the file's order.

    Raises DataError for a file that is not such a list, a level without characters, and an entry of several characters.
    """
    remedy = 'Write it as {"level": {"texts": [...]}}, one character each.'
    content = read_json(path, dict[str, Any], remedy=remedy)
    if not content:
        raise DataError(f"{path}: character list must have levels, got none. {remedy}")
    texts = {level: value.get("texts") if isinstance(value, dict) else value for level, value in content.items()}
    levels = validate(texts, dict[str, tuple[str, ...]], where=str(path), remedy=remedy)
    problems = []
    for level, characters in levels.items():
        wrong = [text for text in characters if len(text) != 1]
        if wrong or not characters:
            found = f"{wrong[0]!r} and {len(wrong) - 1} more such" if wrong else "none"
            problems.append(f"{path}: {level} must hold single characters, got {found}. {remedy}")
    if problems:
        raise DataError(*problems)
    return {level: tuple(dict.fromkeys(characters)) for level, characters in levels.items()}


def measure_coverage(encoder: Encoder, levels: Mapping[str, Sequence[str]]) -> tuple[LevelCoverage, ...]:
    """The coverage of every level, in order."""
    covered = list_character_tokens(encoder)
    return tuple(
        LevelCoverage(
            level=level,
            num_characters=len(characters),
            num_covered=sum(character in covered for character in characters),
        )
        for level, characters in levels.items()
    )


def list_character_tokens(encoder: Encoder) -> frozenset[str]:
    """Every character that one token stands for by itself, read from the vocabulary."""
    if isinstance(encoder, SentencePieceEncoder):
        texts = (
            piece.surface
            for piece in read_sentencepiece_model(encoder.path).pieces
            if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED)
        )
        return frozenset(text for text in texts if len(text) == 1)
    return _list_hugging_face_characters(encoder.path)


def _list_hugging_face_characters(path: Path) -> frozenset[str]:
    """In a byte-level vocabulary (GPT-2's) every character of a token's spelling stands for one byte."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Added tokens are stored as plain text, all others in the spelling of the vocabulary.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    spellings = set(tokenizer.get_vocab(with_added_tokens=False)) - added
    if _is_byte_level(json.loads(path.read_bytes()).get("decoder")):
        byte_of = _list_byte_spellings()
        # A character has at most four bytes in UTF-8.
        decoded = (_decode_bytes(text, byte_of) for text in spellings if len(text) <= 4)
        return frozenset(text for text in {*decoded, *added} if len(text) == 1)
    texts = (text.replace(WHITESPACE_SYMBOL, " ") for text in spellings | added)
    return frozenset(text for text in texts if len(text) == 1)


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    # A Sequence of decoders holds others inside it.
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", ())))


def _list_byte_spellings() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones are themselves, the others follow from U+0100 on.

    Source: bytes_to_unicode in github.com/openai/gpt-2 src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decode_bytes(spelling: str, byte_of: dict[str, int]) -> str:
    try:
        return bytes(byte_of[character] for character in spelling).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return ""
