"""Extend a SentencePiece BPE model with pieces of another model; the ids of the base never change.

`merge_characters` is HammerLLM's way: required characters of the other model, then user-defined symbols.
`merge_vocabulary` is the way of Chinese-LLaMA and tiny-llm-zh: every piece of the other model.
The settings of the base stay (normaliser, dummy prefix, byte fallback), so text is cut as the model was trained on it.
Not here: embedding rows for the new ids (checkpoint/surgery).

Source: tokenizer/merge.py of github.com/Academic-Hammer/HammerLLM and tokenizer/expend_tokenizer.py of
github.com/wdndev/tiny-llm-zh; the first pinned by tests/numerics/test_tokenizer_merge_published.py.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    SENTENCEPIECE_LOGS_ERRORS_ONLY,
    WHITESPACE_SYMBOL,
    Piece,
    PieceType,
    SentencePieceModel,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from megatron_hammer.tokenizer.vocabulary.vocabulary_files import spell_piece

AddedScores = Literal["zero", "calibrated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelReport:
    """How many characters of one level were found in which model."""

    level: str
    num_characters: int
    num_in_base: int
    num_added: int
    num_in_neither: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What a merge did.

    score_ratio: mean of base score / other score over `num_shared_characters`; None where scores are not calibrated.
    retyped_symbols: ordinary pieces of the base that are user-defined now, with their old ids.
    present_symbols: symbols that the base had as such. added_pieces: of `merge_vocabulary` only.
    """

    num_base_pieces: int
    num_pieces: int
    num_shared_characters: int
    score_ratio: float | None
    levels: tuple[LevelReport, ...] = ()
    added_characters: tuple[str, ...] = ()
    added_pieces: tuple[str, ...] = ()
    added_symbols: tuple[str, ...] = ()
    retyped_symbols: tuple[str, ...] = ()
    present_symbols: tuple[str, ...] = ()

    @property
    def num_added(self) -> int:
        return self.num_pieces - self.num_base_pieces


def select_own_requirements(other: SentencePieceModel, path: Path) -> dict[str, tuple[str, ...]]:
    """Return the characters that `other` was trained to hold, as one level; raises DataError if it names none."""
    if not other.required_chars:
        raise DataError(
            f"{path}: model must say which characters it was trained to hold, got none. Pass --required-chars-file."
        )
    return {"required characters of the other model": tuple(dict.fromkeys(other.required_chars))}


def select_own_symbols(other: SentencePieceModel) -> tuple[str, ...]:
    """Return the user-defined pieces of `other`, in the order of their ids."""
    return tuple(piece.text for piece in other.pieces if piece.type is PieceType.USER_DEFINED)


def read_bpe_model(path: Path) -> SentencePieceModel:
    """Read a model that can be merged; raises DataError if it is not SentencePiece BPE."""
    model = read_sentencepiece_model(path)
    if model.model_type != "bpe":
        raise DataError(
            f"{path}: model must be BPE to be merged, got model_type={model.model_type}. "
            "Its scores mean something else; train a BPE model."
        )
    return model


def merge_characters(
    base: SentencePieceModel,
    other: SentencePieceModel,
    levels: Mapping[str, Sequence[str]],
    symbols: Sequence[str] = (),
) -> tuple[SentencePieceModel, MergeReport]:
    """Append the characters of `levels` that only `other` has, then the symbols.

    A character's score is its score in `other` times the mean ratio over the characters of the first level (the most
    common ones) that both models have. A character that neither has is left out, and counted.
    Raises DataError if the models share no character of the first level, or if there is nothing to add.
    """
    base_pieces, other_pieces = _index_pieces(base), _index_pieces(other)
    # Scores of BPE pieces are ranks: between two models of different sizes they are comparable by a factor only.
    ratios = list_score_ratios(base_pieces, other_pieces, next(iter(levels.values())))
    ratio = _average_ratios(ratios, next(iter(levels)))
    characters = dict.fromkeys(spell_piece(character) for level in levels.values() for character in level)
    added = [
        dataclasses.replace(other_pieces[character], score=_round_to_float32(other_pieces[character].score * ratio))
        for character in characters
        if character not in base_pieces and character in other_pieces
    ]
    model, report = _append(base, added, symbols)
    added_texts = tuple(piece.text for piece in added)
    return model, dataclasses.replace(
        report,
        num_shared_characters=len(ratios),
        score_ratio=ratio,
        levels=tuple(_count_level(name, level, base_pieces, frozenset(added_texts)) for name, level in levels.items()),
        added_characters=added_texts,
    )


def merge_vocabulary(
    base: SentencePieceModel,
    other: SentencePieceModel,
    symbols: Sequence[str] = (),
    *,
    scores: AddedScores = "calibrated",
) -> tuple[SentencePieceModel, MergeReport]:
    """Append every piece of `other` that `base` lacks, in its order and of its type, then the symbols.

    zero: what tiny-llm-zh and Chinese-LLaMA do; every added piece merges before any of the base, in the order of the
    text, which no list of merges can express: a Hugging Face tokenizer then encodes some text otherwise.
    calibrated: the other's score times the mean ratio over all shared characters, made distinct; text in the base's
    languages keeps its ids, and a Hugging Face tokenizer encodes alike.
    Raises DataError if there is nothing to add, or nothing to calibrate with.
    """
    base_pieces = _index_pieces(base)
    new = [piece for piece in other.pieces if _is_addable(piece) and piece.text not in base_pieces]
    if scores == "zero":
        added = [dataclasses.replace(piece, score=0.0) for piece in new]
        ratios, ratio = [], None
    else:
        other_pieces = _index_pieces(other)
        ratios = list_score_ratios(base_pieces, other_pieces, [text for text in other_pieces if len(text) == 1])
        ratio = _average_ratios(ratios, "all characters")
        added = list(_calibrate(new, ratio, taken={piece.score for piece in base.pieces}))
    model, report = _append(base, added, symbols)
    return model, dataclasses.replace(
        report,
        num_shared_characters=len(ratios),
        score_ratio=ratio,
        added_pieces=tuple(piece.text for piece in added),
    )


def list_score_ratios(
    base_pieces: Mapping[str, Piece], other_pieces: Mapping[str, Piece], characters: Iterable[str]
) -> list[float]:
    """Return base score / other score of every character that is an ordinary piece with a score in both models.

    Whitespace is no such character: Llama-2 gives it -1e9, so that it merges last.
    """
    shared = (
        (base_pieces[character].score, other_pieces[character].score)
        for character in characters
        if _has_score(base_pieces.get(character)) and _has_score(other_pieces.get(character))
    )
    return [base_score / other_score for base_score, other_score in shared]


def write_merged_model(path: Path, model: SentencePieceModel) -> None:
    """Write the model once sentencepiece has loaded it; raises DataError if it does not, or if writing fails."""
    data = serialize_sentencepiece_model(model)
    sentencepiece.set_min_log_level(SENTENCEPIECE_LOGS_ERRORS_ONLY)  # it reports a piece for NUL that InternLM has
    try:
        num_loaded = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    except RuntimeError as error:
        raise DataError(f"{path}: merged model must load, got {error}. Check the pieces of both models.") from error
    if num_loaded != len(model.pieces):
        raise DataError(f"{path}: merged model must have {len(model.pieces)} pieces, got {num_loaded}. Report this.")
    publish_files({path: data})


def _append(
    base: SentencePieceModel, added: Sequence[Piece], symbols: Sequence[str]
) -> tuple[SentencePieceModel, MergeReport]:
    """The base with `added` and the symbols: one that exists as an ordinary piece changes its type and keeps its id."""
    pieces = [*base.pieces, *added]
    id_of = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    new, retyped, present, problems = [], [], [], []
    # In order and once each: the ids follow from the order.
    for symbol in dict.fromkeys(map(spell_piece, symbols)):
        if symbol not in id_of:
            new.append(symbol)
        elif pieces[id_of[symbol]].type is PieceType.USER_DEFINED:
            present.append(symbol)
        # A second piece of the same text would be a broken model.
        elif pieces[id_of[symbol]].type is PieceType.NORMAL:
            retyped.append(symbol)
            pieces[id_of[symbol]] = Piece(symbol, 0.0, PieceType.USER_DEFINED)
        else:
            kind = pieces[id_of[symbol]].type.name.lower()
            problems.append(
                f"user-defined symbol: must not be a piece with another role, got {symbol!r}, which is "
                f"{kind} in the base. Remove it from the list."
            )
    if problems:
        raise DataError(*problems)
    pieces += [Piece(symbol, 0.0, PieceType.USER_DEFINED) for symbol in new]
    # An unchanged copy under a new name would look like an extension.
    if tuple(pieces) == base.pieces:
        raise DataError("merge: the other model must have something that the base lacks, got nothing. Keep the base.")
    report = MergeReport(
        num_base_pieces=len(base.pieces),
        num_pieces=len(pieces),
        num_shared_characters=0,
        score_ratio=None,
        added_symbols=tuple(new),
        retyped_symbols=tuple(retyped),
        present_symbols=tuple(present),
    )
    return dataclasses.replace(base, pieces=tuple(pieces)), report


def _calibrate(new: Iterable[Piece], ratio: float, taken: set[float]) -> Iterator[Piece]:
    """Scores times `ratio` as float32, each moved to the next lower one that is free where another piece has it."""
    for piece in new:
        if piece.type is not PieceType.NORMAL:
            yield piece
            continue
        score = _round_to_float32(piece.score * ratio)
        # Two equal scores merge in the order of the text, which a list of merges cannot express.
        while score in taken:
            score = float(np.nextafter(np.float32(score), np.float32(-np.inf)))
        taken.add(score)
        yield dataclasses.replace(piece, score=score)


def _round_to_float32(score: float) -> float:
    """What the file holds: the product is of doubles, as in HammerLLM's merge."""
    return float(np.float32(score))


def _average_ratios(ratios: Sequence[float], name: str) -> float:
    if not ratios:
        raise DataError(
            f"calibration: the models must share scored characters of {name}, got none. "
            "Put a level that both models have first in the list of required characters."
        )
    return statistics.fmean(ratios)


def _index_pieces(model: SentencePieceModel) -> dict[str, Piece]:
    return {piece.text: piece for piece in model.pieces}


def _has_score(piece: Piece | None) -> bool:
    if piece is None or piece.text == WHITESPACE_SYMBOL:
        return False
    return piece.type is PieceType.NORMAL and piece.score != 0


def _is_addable(piece: Piece) -> bool:
    """Unknown and byte pieces belong to their model; unused ones are not meant to be found."""
    return piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.CONTROL)


def _count_level(
    name: str, level: Sequence[str], base_pieces: Mapping[str, Piece], added: frozenset[str]
) -> LevelReport:
    num_in_base = sum(spell_piece(character) in base_pieces for character in level)
    num_added = sum(spell_piece(character) in added for character in level)
    return LevelReport(
        level=name,
        num_characters=len(level),
        num_in_base=num_in_base,
        num_added=num_added,
        num_in_neither=len(level) - num_in_base - num_added,
    )
