"""A fast encoder in front of the reference, used only after a check that it returns the reference's ids.

`select_encoder` builds it once and checks it; `EncoderChoice.load` makes it in each worker. Our own C kernel is tried
first (native_encoder.py), then `fastokens`. A tokenizer that neither can express, or that they encode otherwise, is
left to the reference with a warning. Long texts are encoded in parts, see text_cuts.
"""

import ctypes
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
from megatron_hammer.tokenizer.encoding.text_cuts import MAX_PART_CHARS, TextCutter, build_text_cutter

# One process encodes on one core: its own threads would spin on the cores of the other workers (read at import).
os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
import fastokens

# Texts of a few kilobytes: a difference is still shown near its place.
PIECES_PER_TEXT = 256
BYTE_TOKEN_START = "<0x"  # fastokens takes a literal "<0x41>" for the byte token of that name where no piece joins it
MAX_SAMPLE_CHARS = 100_000  # the reference encodes this much in a tenth of a second

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
    cutter: cuts long texts, or None where they must be encoded whole.
    warning: one sentence that says why the reference is used, or None.
    """

    reference: DeferredEncoder
    tables: KernelTables | None = None
    definition: bytes | None = None
    prefix: str = ""
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
            return FastEncoder(reference, self.definition, prefix=self.prefix)
        return reference


class FastEncoder(Encoder):
    """The ids of `reference`, several times faster; ids are decoded by the reference itself.

    definition: a tokenizer.json. Raises ValueError if fastokens does not know something in it.
    prefix: put before every text that is not empty.
    """

    def __init__(self, reference: Encoder, definition: bytes, *, prefix: str = ""):
        self._reference = reference
        self._prefix = prefix
        self._tokenizer = fastokens.Tokenizer.from_json_str(definition.decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        copy_facts(reference, self)

    def encode(self, text: str) -> np.ndarray:
        if BYTE_TOKEN_START in text:
            return self._reference.encode(text)
        ids, _ = self._tokenizer.encode_batch_flat([self._prefix + text if text else text])
        return np.frombuffer(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if BYTE_TOKEN_START in "\0".join(texts):  # one search is several times faster than one per text
            return super().encode_batch(texts)
        prefixed = [self._prefix + text if text else text for text in texts] if self._prefix else list(texts)
        ids, offsets = self._tokenizer.encode_batch_flat(prefixed)
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
        # One look at the lengths: nearly every batch has short texts only, and goes on as it is.
        if max(map(len, texts), default=0) > self._max_part_chars:
            return super().encode_batch(texts)
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoder.decode(ids)


def select_encoder(
    reference: Encoder, sample_texts: Sequence[str] = (), kinds: Sequence[str] = ("native", "fastokens")
) -> EncoderChoice:
    """Choose the first encoder that returns the reference's ids for every piece, hostile text and `sample_texts`.

    Of `sample_texts` about the first MAX_SAMPLE_CHARS are compared.
    """
    model = read_sentencepiece_model(reference.path) if isinstance(reference, SentencePieceEncoder) else None
    cutter = build_text_cutter(model) if model else None
    reason = "has no fast encoder"
    for kind in kinds:
        # The kernel knows SentencePiece models only, and needs a C compiler where pip has not built it.
        if kind == "native" and (model is None or load_kernel() is None):
            continue
        try:
            choice = _build_choice(kind, reference, model, cutter)
            difference = find_difference(
                choice.load_whole(reference), reference, list_checked_texts(reference, model, sample_texts)
            )
        except (ConversionError, ValueError) as error:
            reason = f"cannot be expressed for the fast encoder ({'; '.join(str(error).splitlines())})"
            continue
        if difference is None:
            return choice
        # The next encoder is tried: the two fast ones are different programs.
        reason = difference
    warning = f"{reference.path}: tokenizer {reason}. The reference encodes instead, exactly but slower."
    return EncoderChoice(reference=DeferredEncoder(reference), cutter=cutter, warning=warning)


def _build_choice(
    kind: str, reference: Encoder, model: SentencePieceModel | None, cutter: TextCutter | None
) -> EncoderChoice:
    """Raises ConversionError if the tokenizer cannot be expressed for this kind of encoder."""
    if model is None:
        return EncoderChoice(reference=DeferredEncoder(reference), definition=define_without_special_tokens(reference))
    prefix = " " if model.has_dummy_prefix else ""
    if kind == "native":
        return EncoderChoice(
            reference=DeferredEncoder(reference), tables=build_kernel_tables(model), prefix=prefix, cutter=cutter
        )
    definition = define_plain_tokenizer(model)
    return EncoderChoice(reference=DeferredEncoder(reference), definition=definition, prefix=prefix, cutter=cutter)


def define_without_special_tokens(reference: Encoder) -> bytes:
    """The tokenizer.json of `reference`, without special tokens if it reads them in text as plain text."""
    definition = reference.path.read_bytes()
    if not (isinstance(reference, HuggingFaceEncoder) and reference.splits_special_tokens):
        return definition
    fields = orjson.loads(definition)
    # fastokens has no setting such as split_special_tokens.
    fields["added_tokens"] = [token for token in fields["added_tokens"] if not token["special"]]
    return orjson.dumps(fields)


def list_checked_texts(
    reference: Encoder, model: SentencePieceModel | None, sample_texts: Iterable[str]
) -> Iterator[str]:
    """Our own texts, every piece spelt out, and the beginning of `sample_texts`.

    Pieces stand between NULs, which are part of no piece: each is encoded as if it were alone. User-defined symbols
    must be found inside words too. Byte tokens are left out: by their names the reference encodes them.
    """
    yield from SAMPLE_TEXTS
    yield from HOSTILE_TEXTS
    for batch in itertools.batched(_list_piece_texts(reference, model), PIECES_PER_TEXT):
        # Many pieces in one text: 100,000 separate calls would take seconds at every start.
        yield "\0".join(batch).replace(WHITESPACE_SYMBOL, " ")
    if model is not None:
        yield "e".join(piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED)
    num_chars_left = MAX_SAMPLE_CHARS
    for text in sample_texts:
        yield text[:num_chars_left]
        num_chars_left -= len(text)
        if num_chars_left <= 0:
            return


def _list_piece_texts(reference: Encoder, model: SentencePieceModel | None) -> Iterator[str]:
    if model is None:
        return (reference.decode([token_id]) for token_id in range(reference.vocab_size))
    return (piece.text for piece in model.pieces if piece.type is not PieceType.BYTE)


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
