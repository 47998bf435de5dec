"""A fast encoder in front of the reference, used only where it has been seen to return the reference's ids.

`select_encoder` builds it once and checks it; `EncoderChoice.load` makes it in each worker. What `fastokens` cannot
express, or encodes otherwise, is left to the reference with a warning.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fastokens
import numpy as np

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoder import Encoder, HuggingFaceEncoder, load_encoder
from megatron_hammer.tokenizer.hugging_face import SAMPLE_TEXTS, build_fast_tokenizer
from megatron_hammer.tokenizer.sentencepiece_model import read_sentencepiece_model


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderChoice:
    """Which encoder to use for the tokenizer at `path`; can be sent to another process.

    definition: the tokenizer.json that the fast encoder is built from, or None where the reference must be used.
    warning: one sentence that says why the reference is used, or None.
    """

    path: Path
    definition: str | None
    warning: str | None

    def load(self) -> Encoder:
        reference = load_encoder(self.path)
        return reference if self.definition is None else FastEncoder(reference, self.definition)


class FastEncoder(Encoder):
    """The ids of `reference`, several times faster; text is decoded by the reference itself."""

    def __init__(self, reference: Encoder, definition: str):
        self._reference = reference
        self._tokenizer = fastokens.Tokenizer.from_json_str(definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path, self.sha256, self.vocab_size = reference.path, reference.sha256, reference.vocab_size
        self.bos_id, self.eod_id = reference.bos_id, reference.eod_id

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype=np.int32), np.diff(np.frombuffer(offsets, dtype=np.int64))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._reference.decode(ids)


def select_encoder(path: str | Path, sample_texts: Sequence[str] = ()) -> EncoderChoice:
    """Choose the fast encoder if it encodes our own sample and `sample_texts` as the reference does.

    Raises DataError if `path` is not a tokenizer.
    """
    reference = load_encoder(path)
    try:
        definition = _define_fast_tokenizer(reference)
        fast = FastEncoder(reference, definition)
    except (ConversionError, ValueError) as error:
        return _fall_back(reference, f"cannot be expressed for the fast encoder ({error})")
    for text in (*SAMPLE_TEXTS, *sample_texts):
        if not np.array_equal(fast.encode(text), reference.encode(text)):
            return _fall_back(reference, f"is encoded otherwise by the fast encoder, seen on {text[:60]!r}")
    return EncoderChoice(path=reference.path, definition=definition, warning=None)


def _fall_back(reference: Encoder, reason: str) -> EncoderChoice:
    warning = f"{reference.path}: tokenizer {reason}. The reference encodes instead, exactly but slower."
    return EncoderChoice(path=reference.path, definition=None, warning=warning)


@functools.singledispatch
def _define_fast_tokenizer(reference: Encoder) -> str:
    """A tokenizer.json in which literal control tokens are plain text, as they are for sentencepiece."""
    model = read_sentencepiece_model(reference.path)
    definition = json.loads(build_fast_tokenizer(model, name=str(reference.path)).to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["special"]]
    return json.dumps(definition, ensure_ascii=False)


@_define_fast_tokenizer.register
def _(reference: HuggingFaceEncoder) -> str:
    return reference.path.read_text(encoding="utf-8")
