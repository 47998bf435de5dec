"""Merging appends what is missing, keeps every old id, and gives a model that encodes alike in both libraries."""

import dataclasses
import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    SAMPLE_TEXTS,
    build_fast_tokenizer,
    check_same_encoding,
)
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    PieceType,
    SentencePieceModel,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from megatron_hammer.tokenizer.vocabulary.merge_vocabularies import (
    merge_characters,
    merge_vocabulary,
    read_bpe_model,
    select_own_requirements,
    select_own_symbols,
    write_merged_model,
)
from tests.helpers.toy_tokenizer import TOY_TEXTS

ENGLISH = (*TOY_TEXTS[:2], "春眠不觉晓")
CHINESE = (TOY_TEXTS[2], "春眠不觉晓，处处闻啼鸟，春眠不觉晓，夜来风雨声。", "the fox, fox and fox")
HELD_OUT = ("处处闻啼鸟", "the fox 夜来 fox\n  风雨声。 春眠不觉晓 ")


def train(path: Path, texts: tuple[str, ...], vocab_size: int, **options: object) -> SentencePieceModel:
    model = io.BytesIO()
    defaults: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts * 5 for line in text.split("\n")),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=2,
        **defaults | options,
    )
    path.write_bytes(model.getvalue())
    return read_sentencepiece_model(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceModel:
    return train(tmp_path_factory.mktemp("base") / "base.model", ENGLISH, 341)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceModel:
    folder = tmp_path_factory.mktemp("other")
    symbols = ["<SEP>", "</p >", "7"]
    return train(folder / "other.model", CHINESE, 337, user_defined_symbols=symbols, required_chars="龘靐春")


def spell(model: SentencePieceModel) -> list[str]:
    return [piece.text for piece in model.pieces]


def test_characters_are_appended_with_calibrated_scores(base: SentencePieceModel, other: SentencePieceModel) -> None:
    base_scores = {piece.text: piece.score for piece in base.pieces}
    other_scores = {piece.text: piece.score for piece in other.pieces}
    merged, report = merge_characters(base, other, {"common": ("春", "眠"), "rare": ("龘", "春", "靐", "鬱")})
    assert merged.pieces[:341] == base.pieces
    ratio = (base_scores["春"] / other_scores["春"] + base_scores["眠"] / other_scores["眠"]) / 2
    assert report.score_ratio == pytest.approx(ratio, rel=1e-15)
    assert [(piece.text, piece.score) for piece in merged.pieces[341:]] == [
        ("龘", pytest.approx(other_scores["龘"] * ratio)),
        ("靐", pytest.approx(other_scores["靐"] * ratio)),
    ]
    assert {piece.type for piece in merged.pieces[341:]} == {PieceType.NORMAL}
    assert (report.num_shared_characters, report.num_added, report.added_characters) == (2, 2, ("龘", "靐"))
    rare = report.levels[1]
    assert (rare.num_characters, rare.num_in_base, rare.num_added, rare.num_in_neither) == (4, 1, 2, 1)
    assert merged.specs == base.specs


def test_only_the_first_level_calibrates(base: SentencePieceModel, other: SentencePieceModel) -> None:
    ratios = [
        merge_characters(base, other, levels)[1].score_ratio
        for levels in ({"a": ("春",), "b": ("眠", "龘")}, {"a": ("眠",), "b": ("春", "龘")})
    ]
    assert ratios[0] != ratios[1]


def test_symbols_are_user_defined_and_ordinary_pieces_keep_their_ids(
    base: SentencePieceModel, other: SentencePieceModel, tmp_path: Path
) -> None:
    symbols = ("<SEP>", "ox", "春", "</p >", "<SEP>", "龘")
    merged, report = merge_characters(base, other, {"all": ("春", "龘")}, symbols)
    texts = spell(merged)
    assert len(set(texts)) == len(texts)
    assert report.added_symbols == ("<SEP>", "</p\u2581>")
    assert report.retyped_symbols == ("ox", "春", "龘")
    for symbol in ("ox", "春"):
        assert texts.index(symbol) == spell(base).index(symbol)
    for symbol in (*report.added_symbols, *report.retyped_symbols):
        piece = merged.pieces[texts.index(symbol)]
        assert (piece.type, piece.score) == (PieceType.USER_DEFINED, 0.0)
    write_merged_model(tmp_path / "m.model", merged)
    encoder = load_encoder(tmp_path / "m.model")
    assert [encoder.decode([token]) for token in encoder.encode("a<SEP></p >ox")] == ["a", "<SEP>", "</p >", "ox"]
    again, report = merge_characters(merged, other, {"all": ("眠", "靐")}, ("<SEP>", "</p >", "<new>"))
    assert report.present_symbols == ("<SEP>", "</p\u2581>")
    assert spell(again)[len(texts) :] == ["靐", "<new>"]


def test_the_required_characters_of_the_other_model_are_the_default(other: SentencePieceModel) -> None:
    assert select_own_requirements(other, Path("other.model")) == {
        "required characters of the other model": ("龘", "靐", "春")
    }
    assert select_own_symbols(other) == ("<SEP>", "</p >", "7")


@pytest.mark.parametrize("scores", ["zero", "calibrated"])
def test_a_vocabulary_is_appended_once(
    base: SentencePieceModel, other: SentencePieceModel, tmp_path: Path, scores: str
) -> None:
    merged, report = merge_vocabulary(base, other, ("<|user|>",), scores=scores)
    assert merged.pieces[:341] == base.pieces
    texts = spell(merged)
    assert len(set(texts)) == len(texts)
    assert set(texts) == {*spell(base), *spell(other), "<|user|>"}
    lacking = tuple(piece.text for piece in other.pieces if piece.text not in set(spell(base)))
    assert report.added_pieces == lacking
    assert texts[341:] == [*lacking, "<|user|>"]
    kinds = {piece.text: piece.type for piece in merged.pieces}
    assert (kinds["<SEP>"], kinds["<|user|>"], kinds["闻"]) == (
        PieceType.USER_DEFINED,
        PieceType.USER_DEFINED,
        PieceType.NORMAL,
    )
    write_merged_model(tmp_path / "m.model", merged)
    encoder = load_encoder(tmp_path / "m.model")
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialize_sentencepiece_model(base))
    for text in (*CHINESE, *HELD_OUT):
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text
        assert len(ids) <= len(processor.encode(text))
    assert len(encoder.encode(CHINESE[1])) < len(processor.encode(CHINESE[1]))


def test_zero_scores_are_zero_and_calibrated_ones_distinct(base: SentencePieceModel, other: SentencePieceModel) -> None:
    zero, report = merge_vocabulary(base, other, scores="zero")
    assert {piece.score for piece in zero.pieces[341:]} == {0.0}
    assert report.score_ratio is None
    same_scores = dataclasses.replace(
        other, pieces=tuple(dataclasses.replace(p, score=-1.0) if p.score < 0 else p for p in other.pieces)
    )
    for model in (other, same_scores):
        calibrated, report = merge_vocabulary(base, model)
        scores = [p.score for p in calibrated.pieces if p.type is PieceType.NORMAL]
        assert len(set(scores)) == len(scores)
        assert report.score_ratio is not None


def test_merged_models_encode_alike_in_hugging_face(
    base: SentencePieceModel, other: SentencePieceModel, tmp_path: Path
) -> None:
    models = (
        merge_characters(base, other, {"all": ("春", "龘")}, ("<SEP>", "7", "fox"))[0],
        merge_vocabulary(base, other, ("<|user|>",))[0],
    )
    for number, model in enumerate(models):
        path = tmp_path / f"{number}.model"
        write_merged_model(path, model)
        texts = [text for text in (*SAMPLE_TEXTS, *CHINESE, *HELD_OUT) if "</p >" not in text]
        check_same_encoding(load_encoder(path), build_fast_tokenizer(model, name="merged"), texts)


def test_whitespace_does_not_calibrate(base: SentencePieceModel, other: SentencePieceModel) -> None:
    def rescore(model: SentencePieceModel, score: float) -> SentencePieceModel:
        pieces = tuple(dataclasses.replace(p, score=score) if p.text == "\u2581" else p for p in model.pieces)
        return dataclasses.replace(model, pieces=pieces)

    ratios = {merge_vocabulary(rescore(base, score), other)[1].score_ratio for score in (-1e9, -1.0)}
    assert len(ratios) == 1


def test_problems_are_named(base: SentencePieceModel, other: SentencePieceModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the other model must have.*got nothing"):
        merge_vocabulary(base, base)
    with pytest.raises(DataError, match="that the base lacks, got nothing"):
        merge_characters(base, other, {"all": ("春", "鬱")})
    with pytest.raises(DataError, match=r"the models must share .* rare, got none"):
        merge_characters(base, other, {"rare": ("龘",)})
    with pytest.raises(DataError, match=r"must not be a piece.*got '<s>', which is control in the") as e:
        merge_characters(base, other, {"all": ("春", "龘")}, ("<s>", "<0x0A>"))
    assert "got '<0x0A>', which is byte in the base. Remove it from the list." in e.value.problems[1]
    with pytest.raises(DataError, match=r"o.model: model must say which.*got none"):
        select_own_requirements(base, Path("o.model"))
    train(tmp_path / "u.model", ENGLISH, 307, model_type="unigram")
    with pytest.raises(DataError, match=r"u.model: model must be BPE.*got model_type=unigram"):
        read_bpe_model(tmp_path / "u.model")
    with pytest.raises(DataError, match=r"absent.model: file cannot be read"):
        read_bpe_model(tmp_path / "absent.model")


def test_a_model_that_does_not_load_is_not_written(base: SentencePieceModel, tmp_path: Path) -> None:
    twice = dataclasses.replace(base, pieces=(*base.pieces, base.pieces[-1]))
    with pytest.raises(DataError, match=r"m.model: merged model must load, got "):
        write_merged_model(tmp_path / "m.model", twice)
    assert not list(tmp_path.iterdir())
