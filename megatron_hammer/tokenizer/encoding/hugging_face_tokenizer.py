"""A Hugging Face tokenizer that encodes exactly as a SentencePiece BPE model.

transformers' own conversion adds a prefix space, leaves user-defined symbols to merges and reads a literal `</s>` in
text as the control token. The files of a Hugging Face folder are written by tokenizer/export/export_tokenizer.py.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import orjson
import tokenizers
from tokenizers import decoders, models, normalizers

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.charsmap_normalizer import list_charsmap_steps, list_normalized_texts
from megatron_hammer.tokenizer.encoding.encoder import Encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    WHITESPACE_SYMBOL,
    Piece,
    PieceType,
    SentencePieceModel,
)

NUL = "\0"
# decoders.Strip takes a number of characters; no text begins with this many spaces.
ALL_LEADING = 1_000_000
SPECIAL_TYPES = (PieceType.CONTROL, PieceType.UNKNOWN)

# What has told tokenizers apart: Chinese, English, code, runs of whitespace, digits, characters outside any vocabulary
# (bytes), normalisation, literal control tokens, text that begins or ends with a space, and nothing at all.
SAMPLE_TEXTS = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "  two spaces, then\n\n\nnewlines\t\ttabs   and    more     \r\n",
    "床前明月光,疑是地上霜。举头望明月,低头思故乡。",
    "TiDB 是一个分布式数据库,支持水平扩展;版本 v7.5.0 于 2023-12-01 发布。",
    "def f(x: int) -> int:\n    return x ** 2  # 平方\n\n\nif __name__ == '__main__':\n\tprint(f(12345))\n",
    "3.14159 1,000,000 0x7fff 1e-5 2024年10月25日",
    "𠮷野家 🦀👩‍👩‍👧 e\u0301 \ufeff\u00a0\u3000\u2028 ﬁ Ｆｕｌｌ　ｗｉｄｔｈ ½ ㎏",
    "<s>literal control tokens</s> <unk> <pad> <|endoftext|> [INST]",
    "a" * 50 + " " * 37 + "=" * 64 + "\n" * 9 + "-" * 33 + "。" * 11,
    "<h1>标题</h1><br/><p>段落</p >CLS><SEP>",
    "العربية हिन्दी 한국어 русский ελληνικά \x00\x01\x7f",
    f"{WHITESPACE_SYMBOL}literal{WHITESPACE_SYMBOL}{WHITESPACE_SYMBOL}escape symbols",
    f"at the end {WHITESPACE_SYMBOL} {WHITESPACE_SYMBOL}",
)


def build_fast_tokenizer(model: SentencePieceModel, *, name: str) -> tokenizers.Tokenizer:
    """A tokenizers.Tokenizer that encodes as the SentencePiece BPE model does, control tokens in text included.

    Raises ConversionError for what `tokenizers` cannot express, calling the model `name`.
    """
    _validate_expressible(model, name)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=_build_vocabulary(model),
            merges=list_merges(model),
            unk_token=model.unknown_piece,
            fuse_unk=True,
            byte_fallback=model.has_byte_fallback,
        )
    )
    if steps := list(_normalizer_steps(model, name)):
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(list(_decoder_steps(model)))
    tokenizer.add_special_tokens(
        # Not normalised: pieces are looked up as the model stores them.
        [tokenizers.AddedToken(piece.text, normalized=False) for piece in model.pieces if piece.type in SPECIAL_TYPES]
    )
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for _, text in list_symbols(model)])
    # A literal `</s>` in text is text, as in sentencepiece.
    tokenizer.encode_special_tokens = True
    return tokenizer


def define_plain_tokenizer(model: SentencePieceModel) -> bytes:
    """A tokenizer.json for encoding only, in which literal control tokens are plain text.

    It adds no dummy prefix: give it text that begins with one. Raises ConversionError if the model cannot be expressed.
    """
    refuse_rewriting(model)
    unknown = model.unknown_piece
    control = {piece.text for piece in model.pieces if piece.type in SPECIAL_TYPES}
    # tokenizers refuses an added token that lacks one of these.
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": token_id, "content": text, **flags} for token_id, text in list_symbols(model)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": WHITESPACE_SYMBOL},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else _unmatchable(unknown),
            "fuse_unk": True,
            "byte_fallback": model.has_byte_fallback,
            "vocab": {_unmatchable(key) if key in control else key: i for key, i in _build_vocabulary(model).items()},
            "merges": [f"{left} {right}" for left, right in list_merges(model)],  # shorter to read than pairs
        },
    }
    return orjson.dumps(definition)


def refuse_rewriting(model: SentencePieceModel) -> None:
    """Raise ConversionError, naming every reason, if `model` does more to a text than to escape spaces and to merge."""
    reasons = list_inexpressible(model)
    if model.precompiled_charsmap or model.removes_extra_whitespaces:
        reasons.append("its normaliser rewrites text: fast encoders know no character maps")
    if any(" " in piece.text for piece in model.pieces if piece.type is PieceType.NORMAL):
        reasons.append("a piece with a space: spaces are escaped before pieces are looked up")
    if any(WHITESPACE_SYMBOL in text for _, text in list_symbols(model)):
        reasons.append("user-defined symbols with white space: they are looked for in raw text")
    if reasons:
        raise ConversionError(*reasons)


def list_symbols(model: SentencePieceModel) -> list[tuple[int, str]]:
    """The user-defined symbols by id; one with a space never matches, as spaces are escaped before it is looked for."""
    return [
        (token_id, piece.text)
        for token_id, piece in enumerate(model.pieces)
        if piece.type is PieceType.USER_DEFINED and " " not in piece.text
    ]


def _build_vocabulary(model: SentencePieceModel) -> dict[str, int]:
    return {_vocabulary_key(piece, model): token_id for token_id, piece in enumerate(model.pieces)}


def _vocabulary_key(piece: Piece, model: SentencePieceModel) -> str:
    """With byte fallback sentencepiece never uses a piece for NUL, but its byte."""
    return _unmatchable(NUL) if piece.text == NUL and model.has_byte_fallback else piece.text


def _unmatchable(text: str) -> str:
    """A key that no text can contain, because every space is escaped before pieces are looked up.

    fastokens looks up whole stretches of text in the vocabulary before it merges, so removing the merges is not enough.
    """
    return f" {text}"


def _validate_expressible(model: SentencePieceModel, name: str) -> None:
    reasons = list_inexpressible(model)
    if model.has_dummy_prefix and any(piece.type is PieceType.USER_DEFINED for piece in model.pieces):
        reasons.append("add_dummy_prefix with user-defined symbols: the prefix would be added after each of them")
    problems = [
        f"{name}: tokenizer must be one that Hugging Face can express exactly, got {reason}. "
        "Pass --no-tokenizer and encode with sentencepiece."
        for reason in reasons
    ]
    if problems:
        raise ConversionError(*problems)


def list_inexpressible(model: SentencePieceModel) -> list[str]:
    """The settings of the model that a tokenizer.json cannot express, each with the reason."""
    types = {piece.type for piece in model.pieces}
    reasons = [
        (model.model_type != "bpe", f"model_type={model.model_type}: only BPE merges are mapped"),
        (PieceType.UNUSED in types, "unused pieces: they are split again after merging"),
        (
            model.removes_extra_whitespaces and PieceType.USER_DEFINED in types,
            "remove_extra_whitespaces with user-defined symbols: spaces beside each of them would be removed",
        ),
        (model.treats_whitespace_as_suffix, "treat_whitespace_as_suffix: whitespace must lead its word"),
        (not model.escapes_whitespaces, "escape_whitespaces=false: whitespace must be escaped"),
    ]
    return [reason for is_wrong, reason in reasons if is_wrong]


def _normalizer_steps(model: SentencePieceModel, name: str) -> Iterator[Any]:
    if model.precompiled_charsmap:
        yield from list_charsmap_steps(model.precompiled_charsmap, name)
    if model.removes_extra_whitespaces:
        # Spaces only: Strip would take line ends too. At the end, sentencepiece takes the symbol for a space as well.
        yield normalizers.Replace(tokenizers.Regex(rf"\A +|[ {WHITESPACE_SYMBOL}]+\z"), "")
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    if model.has_dummy_prefix:
        # After surplus spaces are removed: behind the prefix they would no longer be at the start.
        yield normalizers.Prepend(WHITESPACE_SYMBOL)
    yield normalizers.Replace(" ", WHITESPACE_SYMBOL)


def _decoder_steps(model: SentencePieceModel) -> Iterator[Any]:
    """sentencepiece takes the dummy prefix off again, or every leading space where it would remove those."""
    yield decoders.Replace(WHITESPACE_SYMBOL, " ")
    yield decoders.ByteFallback()
    yield decoders.Fuse()
    if model.removes_extra_whitespaces:
        yield decoders.Strip(content=" ", left=ALL_LEADING, right=0)
    elif model.has_dummy_prefix:
        yield decoders.Strip(content=" ", left=1, right=0)


def list_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every pair of pieces whose concatenation is a piece, best score first, as sentencepiece merges them."""
    # NUL is encoded as its byte then, so no merge may build on it.
    never_merged = NUL if model.has_byte_fallback else None
    ranked = sorted(
        (-piece.score, token_id, piece.text)
        for token_id, piece in enumerate(model.pieces)
        if piece.type is PieceType.NORMAL and piece.text != never_merged
    )
    parts = {text for _, _, text in ranked}
    return [
        (text[:cut], text[cut:])
        for _, _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in parts and text[cut:] in parts
    ]


def list_texts_of(model: SentencePieceModel) -> Iterator[str]:
    """The text of every piece by itself, and texts of all that the normaliser replaces."""
    for piece in model.pieces:
        if piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED):
            yield piece.surface
    if model.precompiled_charsmap:
        yield from list_normalized_texts(model.precompiled_charsmap)


def check_same_encoding(encoder: Encoder, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> None:
    """Raise ConversionError at the first text whose ids, or the text decoded from them, differ.

    Texts with an unknown character are not decoded: sentencepiece writes " ⁇ " there, Hugging Face the token's name.
    """
    unknown_id = tokenizer.token_to_id(tokenizer.model.unk_token) if tokenizer.model.unk_token else None
    for batch in itertools.batched(texts, 1000):
        encodings = tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            expected = encoder.encode(text).tolist()
            if encoding.ids != expected:
                raise differs(text, expected, encoding.ids)
            # Both decoders name the unknown token differently, as said above.
            if unknown_id in expected:
                continue
            decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
            if decoded != encoder.decode(expected):
                raise differs(text, encoder.decode(expected), decoded)


def differs(text: str, expected: Any, got: Any) -> ConversionError:
    return ConversionError(
        f"tokenizer: both must encode {text[:60]!r} alike, got {str(got)[:200]} for {str(expected)[:200]}. "
        "Pass --no-tokenizer and encode with the original."
    )
