"""The files that list what a vocabulary must hold: required characters, and symbols that are never cut.

Characters: UTF-8 text, in which every character counts, or JSON in levels as coverage.py reads it, the most common
characters first. Symbols: one per line, taken literally; a space in one is stored as sentencepiece stores spaces.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.errors import DataError
from megatron_hammer.files.read import read_text
from megatron_hammer.tokenizer.encoding.sentencepiece_model import WHITESPACE_SYMBOL
from megatron_hammer.tokenizer.vocabulary.coverage import read_character_levels

# Bytes as protobuf's text format prints them.
_OCTAL_ESCAPES = re.compile(r"(?:\\[0-7]{3})+")
_TAG_WITHOUT_START = re.compile(r"[^<>]*\w>")
_TAG_WITHOUT_END = re.compile(r"</?\w[^<>]*")
_SPACE_AT_BRACKET = re.compile(r"(?<=<)\s+|\s+(?=/?>$)")


def read_required_levels(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the distinct characters of a file by level, in order; a text file is one level of its name.

    Raises DataError if the file cannot be read, or holds no character.
    """
    if path.suffix == ".json":
        return read_character_levels(path)
    # Line ends separate the characters of such a file; they are not meant as characters.
    characters = tuple(dict.fromkeys(read_text(path).replace("\n", "").replace("\r", "")))
    if not characters:
        raise DataError(f"{path}: file must hold characters, got none. Write one a line.")
    return {path.name: characters}


def read_required_chars(path: Path) -> str:
    """Return the distinct characters of all levels of a file, in order."""
    return "".join(dict.fromkeys("".join("".join(level) for level in read_required_levels(path).values())))


def read_user_defined_symbols(path: Path) -> tuple[str, ...]:
    r"""Return the distinct non-empty lines of a UTF-8 file, in order: `\343` is four characters.

    Raises DataError if the file cannot be read, or holds no symbol.
    """
    symbols = tuple(dict.fromkeys(line for line in read_text(path).split("\n") if line))
    if not symbols:
        raise DataError(f"{path}: file must hold symbols, got none. Write one a line.")
    return symbols


def spell_piece(text: str) -> str:
    """How a piece is stored: sentencepiece never finds one that holds a plain space."""
    return text.replace(" ", WHITESPACE_SYMBOL)


def describe_suspicious_symbols(symbols: Sequence[str]) -> tuple[str, ...]:
    """Return one sentence for each symbol that looks misspelt, and one for octal escapes, which are taken literally."""
    sentences = [
        f"user-defined symbol looks misspelt, got {symbol!r} ({reason}). Write {fixed} if that is meant."
        for symbol in symbols
        for reason, fixed in _find_misspelling(symbol)
    ]
    escapes = [symbol for symbol in symbols if _OCTAL_ESCAPES.fullmatch(symbol)]
    if escapes:
        sentences.append(
            f"user-defined symbols are taken literally, got {len(escapes)} octal escapes such as {escapes[0]}, "
            f"which will not match {_decode_octal(escapes[0])!r}. Write the characters if they are meant."
        )
    return tuple(sentences)


def _find_misspelling(symbol: str) -> list[tuple[str, str]]:
    if _TAG_WITHOUT_START.fullmatch(symbol):
        return [("its angle brackets do not pair", f"<{symbol}")]
    if _TAG_WITHOUT_END.fullmatch(symbol):
        return [("its angle brackets do not pair", f"{symbol}>")]
    if _SPACE_AT_BRACKET.search(symbol):
        return [("a space at an angle bracket", _SPACE_AT_BRACKET.sub("", symbol))]
    return []


def _decode_octal(escapes: str) -> str:
    return bytes(int(digits, 8) & 0xFF for digits in escapes.split("\\")[1:]).decode("utf-8", errors="replace")
