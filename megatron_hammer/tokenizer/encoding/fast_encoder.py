"""A fast encoder in front of the reference, used only where the tokenizer's structure says that their ids are equal.

`select_encoder` chooses it; `EncoderChoice.load` makes it in each worker. Our own C kernel is tried first
(native_encoder.py), then `fastokens`. A tokenizer that neither can express, or that they encode otherwise, is left to
the reference with a warning. The choice depends on the tokenizer alone, never on a corpus, so that all shards of one
job are encoded alike. Long texts are encoded in parts, see text_cuts.
"""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.encoder import (
    DeferredEncoder,
    Encoder,
    HuggingFaceEncoder,
    SentencePieceEncoder,
    copy_facts,
)
from megatron_hammer.tokenizer.encoding.fastokens_conditions import list_conditions_not_met
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import (
    SAMPLE_TEXTS,
    define_plain_tokenizer,
)
from megatron_hammer.tokenizer.encoding.native_encoder import (
    KernelTables,
    NativeEncoder,
    build_kernel_tables,
    load_kernel,
)
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    WHITESPACE_SYMBOL,
    PieceType,
    SentencePieceModel,
    read_sentencepiece_model,
)
from megatron_hammer.tokenizer.encoding.small_vocabulary import shrink_vocabulary, write_merges_as_text
from megatron_hammer.tokenizer.encoding.text_cuts import MAX_PART_CHARS, TextCutter, build_text_cutter

# One process encodes on one core: its own threads would spin on the cores of the other workers (read at import).
os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
import fastokens

# Texts of a few kilobytes: a difference is still shown near its place.
PIECES_PER_TEXT = 256
MAX_PAIRED_TOKENS = 24
# fastokens takes a literal "<0x41>" for the byte token of that name where no piece joins it, and the long s behind an
# apostrophe for no contraction, where `(?i:'s)` says that it is one.
LEFT_TO_REFERENCE = ("<0x", "'\u017f")

# Beside SAMPLE_TEXTS: what a fast encoder might treat by another path than ordinary text.
HOSTILE_TEXTS = (
    "\0",
    "a\0b\0\0",
    "<s></s><unk><s",
    "\ufffd\ufffe\uffff\U000e0001\U0010ffff\u0378",
    "👩‍👩‍👧‍👦🏳️‍🌈🇨🇳 e\u0301\u0323 ﷽",
    "a" * 3000,
    " " * 3000 + "。" * 3000 + "\n" * 3000,
    "0123456789" * 100 + "....!!!???---",
    "".join(chr(code_point) for code_point in range(1, 0x3000)),
    "日本語とEnglishと한국어и русский ١٢٣ ⅷ",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderChoice:
    """Which encoder to use in front of `reference`; can be sent to another process.

    tables: what the native encoder is built from. definition: the tokenizer.json that fastokens is built from. Both are
    None where the reference must be used.
    prefix: what the fast encoder puts before every text that is not empty.
    splits_special_tokens: a special token spelt out in a text is plain text for fastokens.
    cutter: cuts long texts, or None where they must be encoded whole.
    warning: one sentence that says why the reference is used, or None.
    """

    reference: DeferredEncoder
    tables: KernelTables | None = None
    definition: bytes | None = None
    prefix: str = ""
    splits_special_tokens: bool = False
    cutter: TextCutter | None = None
    warning: str | None = None

    def load(self) -> Encoder:
        # The reference reads its file only when it is asked to encode, which a fast encoder rarely does.
        encoder = self.load_whole(self.reference)
        # Each worker holds an encoder, and building one needs far more memory than keeping it.
        _return_free_memory()
        return encoder if self.cutter is None else PartwiseEncoder(encoder, self.cutter)

    def load_whole(self, reference: Encoder) -> Encoder:
        """The encoder in front of `reference`, without the cutter."""
        if self.tables is not None:
            return NativeEncoder(reference, self.tables, prefix=self.prefix)
        if self.definition is not None:
            return FastEncoder(
                reference,
                self.definition,
                prefix=self.prefix,
                splits_special_tokens=self.splits_special_tokens,
            )
        return reference


class FastEncoder(Encoder):
    """The ids of `reference`, several times faster; ids are decoded by the reference itself.

    definition: a tokenizer.json. Raises ValueError if fastokens does not know something in it.
    prefix: put before every text that is not empty. splits_special_tokens: as in EncoderChoice.
    """

    def __init__(self, reference: Encoder, definition: bytes, *, prefix: str = "", splits_special_tokens: bool = False):
        self._reference = reference
        self._prefix = prefix
        self._splits_special_tokens = splits_special_tokens
        self._tokenizer = fastokens.Tokenizer.from_json_str(definition.decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        copy_facts(reference, self)

    def encode(self, text: str) -> np.ndarray:
        if any(part in text for part in LEFT_TO_REFERENCE):
            return self._reference.encode(text)
        prefixed = self._prefix + text if text else text
        ids, _ = self._tokenizer.encode_batch_flat([prefixed], split_special_tokens=self._splits_special_tokens)
        return np.frombuffer(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = "\0".join(texts)  # one search is several times faster than one per text
        if any(part in joined for part in LEFT_TO_REFERENCE):
            return super().encode_batch(texts)
        prefixed = [self._prefix + text if text else text for text in texts] if self._prefix else list(texts)
        ids, offsets = self._tokenizer.encode_batch_flat(prefixed, split_special_tokens=self._splits_special_tokens)
        return np.frombuffer(ids, dtype=np.int32), np.diff(np.frombuffer(offsets, dtype=np.int64))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._reference.decode(ids)


class PartwiseEncoder(Encoder):
    """The ids of `encoder`, with long texts encoded in parts, so that they need memory for one part at a time."""

    def __init__(self, encoder: Encoder, cutter: TextCutter, max_part_chars: int = MAX_PART_CHARS):
        self._encoder = encoder
        self._cutter = cutter
        self._max_part_chars = max_part_chars
        copy_facts(encoder, self)

    def encode(self, text: str) -> np.ndarray:
        parts = self._cutter.cut(text, self._max_part_chars)
        return np.concatenate([self._encoder.encode(part) for part in parts])

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # One look at the lengths: nearly every batch has short texts only, and is passed on as it is.
        if max(map(len, texts), default=0) > self._max_part_chars:
            return super().encode_batch(texts)
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoder.decode(ids)


def select_encoder(reference: Encoder, kinds: Sequence[str] = ("native", "fastokens")) -> EncoderChoice:
    """Choose the first encoder that must return the reference's ids, and returns them for our own texts."""
    model = read_sentencepiece_model(reference.path) if isinstance(reference, SentencePieceEncoder) else None
    cutter = build_text_cutter(model) if model else None
    reason = "has no fast encoder"
    for kind in kinds:
        # The kernel knows SentencePiece models only, and needs a C compiler where pip has not built it.
        if kind == "native" and (model is None or load_kernel() is None):
            continue
        try:
            if isinstance(reference, HuggingFaceEncoder):
                return _choose_for_hugging_face(reference)
            assert model is not None  # there are two kinds of reference
            return _choose_for_sentencepiece(kind, reference, model, cutter)
        except (ConversionError, ValueError) as error:
            # The next encoder is tried: the two fast ones are different programs.
            reason = "; ".join(str(error).splitlines())
    warning = f"{reference.path}: tokenizer {reason}. The reference encodes instead, exactly but slower."
    return EncoderChoice(reference=DeferredEncoder(reference), cutter=cutter, warning=warning)


def _choose_for_sentencepiece(
    kind: str, reference: Encoder, model: SentencePieceModel, cutter: TextCutter | None
) -> EncoderChoice:
    """Raises ConversionError with the reason, as the end of a sentence, if this kind of encoder cannot be used."""
    try:
        tables = build_kernel_tables(model) if kind == "native" else None
        definition = define_plain_tokenizer(model) if kind == "fastokens" else None
    except ConversionError as error:
        reasons = "; ".join(error.problems)
        raise ConversionError(f"cannot be expressed for the fast encoder ({reasons})") from error
    choice = EncoderChoice(
        reference=DeferredEncoder(reference),
        tables=tables,
        definition=definition,
        prefix=" " if model.has_dummy_prefix else "",
        cutter=cutter,
    )
    _require_no_difference(choice.load_whole(reference), reference, list_checked_texts(model))
    return choice


def _choose_for_hugging_face(reference: HuggingFaceEncoder) -> EncoderChoice:
    """As above; the check is made with a small part of the vocabulary, because building the whole takes a second."""
    content = orjson.loads(reference.read_definition())
    if reasons := list_conditions_not_met(content, reference.tokenizer):
        raise ConversionError(f"is not one that the fast encoder is known to encode alike ({'; '.join(reasons)})")
    splits = reference.splits_special_tokens
    small = orjson.dumps(shrink_vocabulary(content))
    small_reference = HuggingFaceEncoder(reference.path, small)
    small_encoder = FastEncoder(small_reference, small, splits_special_tokens=splits)
    _require_no_difference(small_encoder, small_reference, list_checked_texts_of(small_reference, content))
    definition = orjson.dumps(write_merges_as_text(content))
    return EncoderChoice(reference=DeferredEncoder(reference), definition=definition, splits_special_tokens=splits)


def list_checked_texts(model: SentencePieceModel) -> Iterator[str]:
    """Our own texts, and every piece spelt out.

    Pieces stand between NULs, which are part of no piece: each is encoded as if it were alone. User-defined symbols
    must be found inside words too. Byte tokens are left out: by their names the reference encodes them.
    """
    yield from SAMPLE_TEXTS
    yield from HOSTILE_TEXTS
    pieces = (piece.text for piece in model.pieces if piece.type is not PieceType.BYTE)
    for batch in itertools.batched(pieces, PIECES_PER_TEXT):
        # Many pieces in one text: 100,000 separate calls would take seconds at every start.
        yield "\0".join(batch).replace(WHITESPACE_SYMBOL, " ")
    yield "e".join(piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED)


def list_checked_texts_of(reference: HuggingFaceEncoder, definition: Mapping[str, Any]) -> Iterator[str]:
    """Our own texts, every piece of a small vocabulary, and added tokens beside each other, spaces and letters."""
    yield from SAMPLE_TEXTS
    yield from HOSTILE_TEXTS
    for batch in itertools.batched((reference.decode([number]) for number in range(reference.vocab_size)), 256):
        yield "\0".join(batch)
    contents = _select_different(definition.get("added_tokens") or [])
    for first in contents:
        yield "\n".join(f"a{first}{second} {first}  {second}\t{first}é {first}" for second in contents)


def _select_different(added: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most MAX_PAIRED_TOKENS contents: some of every combination of flags, since models may have thousands."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for token in added:
        has_space = any(char.isspace() for char in token["content"])
        flags = tuple(value for value in token.values() if isinstance(value, bool))
        groups.setdefault((has_space, *flags), []).append(token["content"])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return list(itertools.islice((content for content in in_turn if content is not None), MAX_PAIRED_TOKENS))


def _require_no_difference(encoder: Encoder, reference: Encoder, texts: Iterable[str]) -> None:
    if difference := find_difference(encoder, reference, texts):
        raise ConversionError(difference)


def find_difference(encoder: Encoder, reference: Encoder, texts: Iterable[str]) -> str | None:
    """Say where the two first differ, as the end of a sentence about the tokenizer; None if they never do."""
    for text in texts:
        ids, expected = encoder.encode(text), reference.encode(text)
        if not np.array_equal(ids, expected):
            num_common = min(len(ids), len(expected))
            # True at the end: where one is the beginning of the other, they differ behind it.
            position = int(np.argmax(np.append(ids[:num_common] != expected[:num_common], True)))
            # The tokens around the difference, so that the warning shows where to look.
            context = reference.decode(expected[max(0, position - 2) : position + 3])
            return f"is encoded otherwise by the fast encoder near {context!r}"
    return None


def _return_free_memory() -> None:
    """Give back what building left behind, more than half of the process with 100,000 pieces; glibc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
