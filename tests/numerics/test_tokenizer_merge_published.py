"""Merging the published models as HammerLLM did gives its published tokenizer, byte for byte."""

import dataclasses
import statistics
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    Piece,
    PieceType,
    SentencePieceModel,
    serialize_sentencepiece_model,
)
from megatron_hammer.tokenizer.vocabulary.merge_vocabularies import (
    list_score_ratios,
    merge_characters,
    merge_vocabulary,
    read_bpe_model,
)
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import read_required_levels, read_user_defined_symbols
from tests.helpers.repository import SHARED_DATA, needs_shared_data

pytestmark = needs_shared_data

FOLDER = SHARED_DATA / "tokenizer"
PUBLISHED_RATIO = 0.9388603563642  # as HammerLLM's README prints it, to the digits on which summation orders agree
CORRECTED = {"CLS>": "<CLS>", "</p >": "</p>"}  # the file has the left ones, the published model the right ones


@pytest.fixture(scope="module")
def base() -> SentencePieceModel:
    return read_bpe_model(FOLDER / "internlm-7b.model")


@pytest.fixture(scope="module")
def other() -> SentencePieceModel:
    return read_bpe_model(FOLDER / "hammerllm-trained-128k.model")


@pytest.fixture(scope="module")
def published() -> SentencePieceModel:
    return read_bpe_model(FOLDER / "hammerllm.model")


@pytest.fixture(scope="module")
def levels() -> dict[str, tuple[str, ...]]:
    return read_required_levels(FOLDER / "charsets_char.json")


def list_differences(merged: SentencePieceModel, published: SentencePieceModel) -> list[tuple[Piece, Piece]]:
    return [pair for pair in zip(merged.pieces, published.pieces, strict=True) if pair[0] != pair[1]]


def test_every_piece_score_and_type_is_published(
    base: SentencePieceModel,
    other: SentencePieceModel,
    published: SentencePieceModel,
    levels: dict[str, tuple[str, ...]],
) -> None:
    symbols = read_user_defined_symbols(FOLDER / "user_defined_symbol_file.txt")
    merged, report = merge_characters(base, other, levels, symbols)
    assert report.score_ratio == pytest.approx(PUBLISHED_RATIO, abs=5e-14)
    assert (report.num_added, report.num_pieces) == (2_621, 105_789)
    assert (len(report.added_characters), len(report.added_symbols), len(report.retyped_symbols)) == (2_536, 85, 16)
    assert list_differences(merged, published) == [
        (Piece("CLS>", 0.0, PieceType.USER_DEFINED), Piece("<CLS>", 0.0, PieceType.USER_DEFINED)),
        (Piece("</p\u2581>", 0.0, PieceType.USER_DEFINED), Piece("</p>", 0.0, PieceType.USER_DEFINED)),
    ]


def test_with_the_two_symbols_corrected_the_file_is_the_published_one(
    base: SentencePieceModel, other: SentencePieceModel, levels: dict[str, tuple[str, ...]]
) -> None:
    symbols = read_user_defined_symbols(FOLDER / "user_defined_symbol_file.txt")
    merged, _ = merge_characters(base, other, levels, [CORRECTED.get(symbol, symbol) for symbol in symbols])
    assert serialize_sentencepiece_model(merged) == (FOLDER / "hammerllm.model").read_bytes()


def test_twin_other_calibrations_are_noticed(
    base: SentencePieceModel, other: SentencePieceModel, levels: dict[str, tuple[str, ...]]
) -> None:
    base_pieces = {piece.text: piece for piece in base.pieces}
    other_pieces = {piece.text: piece for piece in other.pieces}
    every_character = [character for level in levels.values() for character in level]
    for characters in (every_character, list(other_pieces), next(iter(levels.values()))[1:]):
        ratio = statistics.fmean(list_score_ratios(base_pieces, other_pieces, characters))
        assert ratio != pytest.approx(PUBLISHED_RATIO, abs=5e-14)


def test_twin_another_order_or_no_retyping_is_noticed(
    base: SentencePieceModel,
    other: SentencePieceModel,
    published: SentencePieceModel,
    levels: dict[str, tuple[str, ...]],
) -> None:
    symbols = read_user_defined_symbols(FOLDER / "user_defined_symbol_file.txt")
    by_code_point = {name: tuple(sorted(level)) for name, level in levels.items()}
    assert len(list_differences(merge_characters(base, other, by_code_point, symbols)[0], published)) > 2_000
    merged, report = merge_characters(base, other, levels, symbols)
    old = {piece.text: piece for piece in base.pieces}
    untouched = tuple(old[piece.text] if piece.text in report.retyped_symbols else piece for piece in merged.pieces)
    assert len(list_differences(dataclasses.replace(merged, pieces=untouched), published)) == 16 + 2


def test_a_vocabulary_merged_into_llama_2_keeps_its_english(tmp_path: Path, other: SentencePieceModel) -> None:
    """HammerLLM's Chinese pieces stand for the 20k model of tiny-llm-zh, which is not among the shared data."""
    llama = read_bpe_model(FOLDER / "llama2-7b.model")
    chinese = [p for p in other.pieces if p.type is PieceType.NORMAL and any("\u4e00" <= c <= "\u9fff" for c in p.text)]
    part = dataclasses.replace(other, pieces=tuple(chinese[:5_000] + chinese[-8_105:]))
    merged, _ = merge_vocabulary(llama, part)
    path = tmp_path / "merged.model"
    path.write_bytes(serialize_sentencepiece_model(merged))
    before, after = load_encoder(FOLDER / "llama2-7b.model"), load_encoder(path)
    english = "It is always a pleasure to greet a friend from afar.\n\tdef f(x): return x ** 2  # 12345"
    assert after.encode(english).tolist() == before.encode(english).tolist()
    chinese_text = "有朋自远方来，不亦乐乎？白日依山尽，黄河入海流。"
    assert len(after.encode(chinese_text)) < 0.7 * len(before.encode(chinese_text))
    assert after.decode(after.encode(chinese_text)) == chinese_text
