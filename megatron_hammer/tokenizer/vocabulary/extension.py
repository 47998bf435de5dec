"""A tokenizer that extends another one: the same pieces with the same ids, followed by new pieces.

Says which old pieces spell each new piece; a model's new embedding rows are computed from these. Both must be
of one kind: two SentencePiece models, or two Hugging Face tokenizers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, SentencePieceEncoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import Piece, PieceType, read_sentencepiece_model


def validate_extension(old: Encoder, new: Encoder) -> None:
    """Raise DataError unless `new` has every piece of `old` under its id, followed by new ones."""
    if isinstance(old, SentencePieceEncoder) != isinstance(new, SentencePieceEncoder):
        raise DataError(
            f"{new.path}: both tokenizers must be of one kind, got {_name_kind(new)} beside {_name_kind(old)} "
            f"({old.path}). Pass two .model files, or two tokenizer.json files."
        )
    old_pieces, new_pieces = _list_pieces(old), _list_pieces(new)
    for token_id, (old_piece, new_piece) in enumerate(zip(old_pieces, new_pieces, strict=False)):
        # None: an id without a piece, which a new piece may take.
        if old_piece != new_piece and old_piece is not None:
            raise DataError(
                f"{new.path}: ids of the old tokenizer must keep their pieces, got {new_piece!r} at id={token_id} "
                f"for {old_piece!r}. Extend the old tokenizer, as hammer tokenizer merge does."
            )
    if len(new_pieces) <= len(old_pieces):
        raise DataError(
            f"{new.path}: tokenizer must have more pieces than the old one, got {len(new_pieces):,} for "
            f"{len(old_pieces):,}. Embeddings are not made smaller; pass the extended tokenizer."
        )


def spell_new_pieces(old: Encoder, new: Encoder) -> Iterator[list[int]]:
    """Yield, for each id of `new` after those of `old`, the old ids that its text encodes to.

    No dummy prefix is added and no space is dropped, whatever the old tokenizer does to whole texts. Unknown
    characters are left out. Empty: a piece that is not text (a byte), or of which the old tokenizer knows nothing.
    """
    if isinstance(old, SentencePieceEncoder):
        return _spell_sentencepiece(old, new)
    return _spell_hugging_face(old, new)


def _spell_sentencepiece(old: Encoder, new: Encoder) -> Iterator[list[int]]:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(old.path.read_bytes())
    # A piece inside a word must be spelt without the space that begins a text.
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for piece in read_sentencepiece_model(new.path).pieces[old.vocab_size :]:
        ids = processor.encode(piece.surface) if _is_text(piece) else []
        yield [token_id for token_id in ids if token_id != processor.unk_id()]


def _is_text(piece: Piece) -> bool:
    return piece.type not in (PieceType.BYTE, PieceType.UNUSED, PieceType.UNKNOWN)


def _spell_hugging_face(old: Encoder, new: Encoder) -> Iterator[list[int]]:
    """Ordinary tokens are spelt as the vocabulary writes them, past normaliser and prefix; added ones as plain text."""
    tokenizer, extended = _load_tokenizer(old), _load_tokenizer(new)
    added = extended.get_added_tokens_decoder()
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
    for token_id in range(old.vocab_size, new.vocab_size):
        if token_id in added:
            ids = tokenizer.encode(added[token_id].content, add_special_tokens=False).ids
        elif (text := extended.id_to_token(token_id)) is None:
            ids = []
        else:
            ids = [token.id for token in tokenizer.model.tokenize(text)]
        yield [token_id for token_id in ids if token_id != unknown_id]


def _list_pieces(encoder: Encoder) -> Sequence[str | None]:
    """The text of every id as the vocabulary writes it; None for an id that no piece has."""
    if isinstance(encoder, SentencePieceEncoder):
        return [piece.text for piece in read_sentencepiece_model(encoder.path).pieces]
    tokenizer = _load_tokenizer(encoder)
    return [tokenizer.id_to_token(token_id) for token_id in range(encoder.vocab_size)]


def _load_tokenizer(encoder: Encoder) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(encoder.path))


def _name_kind(encoder: Encoder) -> str:
    return "a SentencePiece model" if isinstance(encoder, SentencePieceEncoder) else "a Hugging Face tokenizer"
