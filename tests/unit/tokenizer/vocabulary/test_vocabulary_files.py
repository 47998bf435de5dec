"""Characters by level, symbols line by line, and what looks misspelt in them."""

import json
from pathlib import Path

import pytest

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import (
    describe_suspicious_symbols,
    read_required_chars,
    read_required_levels,
    read_user_defined_symbols,
    spell_piece,
)
from tests.helpers.repository import SHARED_DATA, needs_shared_data


def test_characters_of_text_and_of_levels(tmp_path: Path) -> None:
    (tmp_path / "chars.txt").write_text("龘\n靐\r\n龘x y\n", encoding="utf-8")
    assert read_required_levels(tmp_path / "chars.txt") == {"chars.txt": ("龘", "靐", "x", " ", "y")}
    (tmp_path / "chars.json").write_text(json.dumps({"first": {"texts": ["一", "乙"]}, "second": ["龘", "一"]}))
    assert read_required_levels(tmp_path / "chars.json") == {"first": ("一", "乙"), "second": ("龘", "一")}
    assert read_required_chars(tmp_path / "chars.json") == "一乙龘"


def test_symbols_are_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "symbols.txt").write_text('<SEP>\n<a,b>\n\n"q"\n<SEP>\n\\343\\200\n\u2028\n', encoding="utf-8")
    assert read_user_defined_symbols(tmp_path / "symbols.txt") == ("<SEP>", "<a,b>", '"q"', "\\343\\200", "\u2028")
    assert spell_piece("</p >") == "</p\u2581>"


@pytest.mark.parametrize(
    "symbol, sentence",
    [
        ("CLS>", r"looks misspelt, got 'CLS>' (its angle brackets do not pair). Write <CLS> if that is meant."),
        ("<tab", r"looks misspelt, got '<tab' (its angle brackets do not pair). Write <tab> if that is meant."),
        ("</p >", r"looks misspelt, got '</p >' (a space at an angle bracket). Write </p> if that is meant."),
        ("< br/>", r"looks misspelt, got '< br/>' (a space at an angle bracket). Write <br/> if that is meant."),
        (
            "\\343\\200\\202",
            r"got 1 octal escapes such as \343\200\202, which will not match '。'. Write the",
        ),
    ],
)
def test_symbols_that_look_misspelt_are_reported(symbol: str, sentence: str) -> None:
    (warning,) = describe_suspicious_symbols(["<SEP>", symbol])
    assert sentence in warning


def test_well_spelt_symbols_are_not_reported() -> None:
    symbols = ("<SEP>", "<h2/>", "</h2>", "<!--", "-->", "---", "<!DOCTYPE>", "```", "<", ">", "->", "<|user|>", "7")
    assert describe_suspicious_symbols(symbols) == ()


@needs_shared_data
def test_the_published_list_has_two_misspelt_symbols_and_23_escapes() -> None:
    symbols = read_user_defined_symbols(SHARED_DATA / "tokenizer" / "user_defined_symbol_file.txt")
    first, second, escapes = describe_suspicious_symbols(symbols)
    assert "'CLS>'" in first
    assert "'</p >'" in second
    assert "got 23 octal escapes" in escapes


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt: file cannot be read \(No such file or directory\)"):
        read_required_chars(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    with pytest.raises(DataError, match=r"latin.txt: text must be UTF-8, got byte 0xe9 at offset 2\b"):
        read_user_defined_symbols(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty.txt: file must hold symbols, got none. Write one a line."):
        read_user_defined_symbols(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"empty.txt: file must hold characters, got none. Write one a line."):
        read_required_chars(tmp_path / "empty.txt")
