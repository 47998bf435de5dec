"""Text to token ids and back: the one encoder that every tool uses.

SentencePiece is the reference. A Hugging Face tokenizer is read from its `tokenizer.json` only: nothing that such a
folder may carry is ever executed. A faster encoder with the same ids and interface is in fast_encoder.py.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from megatron_hammer.errors import ConversionError, DataError
from megatron_hammer.files.read import is_present, read_bytes
from megatron_hammer.tokenizer.encoding.sentencepiece_model import SENTENCEPIECE_LOGS_ERRORS_ONLY
from megatron_hammer.tokenizer.encoding.special_tokens import (
    CONFIG_NAME,
    SPECIAL_TOKENS,
    SpecialTokens,
    find_special_tokens,
    list_named_tokens,
    read_config,
)
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

MAX_VOCAB_SIZE = 2**31 - 1  # ids are int32
RUST_PANIC = "PanicException"  # of pyo3; it is no Exception, and no module offers it


class Encoder(ABC):
    """A tokenizer that has been read and can be used; obtain one with `load_encoder`.

    path: the file that defines the encoding. sha256: the hash of that file, which manifests record.
    vocab_size: one more than the largest id that `encode` can return.
    special_tokens: the tokens that begin and end a document.
    """

    path: Path
    sha256: str
    vocab_size: int
    special_tokens: SpecialTokens

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document; None where the tokenizer has none. Raises DataError where it is in doubt."""
        return self.special_tokens.find("bos_token")

    @property
    def eod_id(self) -> int | None:
        """The id that ends a document, as for `bos_id`."""
        return self.special_tokens.find("eos_token")

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`: [num_tokens] int32, with no id added before or after."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts, one after another, and how many each has: int32 [sum], int64 [len(texts)]."""
        ids = [self.encode(text) for text in texts]
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.int32), lengths

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; raises IndexError for an id outside the vocabulary."""


class SentencePieceEncoder(Encoder):
    """A SentencePiece `.model`; control symbols such as a literal `</s>` in the text are encoded as plain text."""

    def __init__(self, path: Path):
        model_bytes = read_bytes(path)
        # A global setting of the library, so every place that loads a model sets it.
        sentencepiece.set_min_log_level(SENTENCEPIECE_LOGS_ERRORS_ONLY)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last for a piece that is not UTF-8
            raise _not_a_model(path) from error
        if self._processor.get_piece_size() == 0:  # an empty file parses as a model without pieces
            raise _not_a_model(path)
        self.path = path
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        ids = {"bos_token": self._processor.bos_id(), "eos_token": self._processor.eos_id()}
        self.special_tokens = SpecialTokens(path)
        for key in SPECIAL_TOKENS:
            self.special_tokens.ids[key] = ids[key] if ids[key] >= 0 else None

    def list_pieces(self) -> dict[str, int]:
        """Every piece and its id."""
        return {self._processor.id_to_piece(number): number for number in range(self.vocab_size)}

    def encode(self, text: str) -> np.ndarray:
        ids: np.ndarray = self._processor.encode_as_numpy(text)  # int32
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(token_id) for token_id in ids])


class HuggingFaceEncoder(Encoder):
    """A Hugging Face `tokenizer.json`, alone or in its folder.

    As in transformers, a special token spelt out in the text becomes that token's id, unless `tokenizer_config.json`
    beside it says split_special_tokens, as for our exports of SentencePiece models.
    """

    def __init__(self, path: Path, content: bytes | None = None):
        """content: read in place of the file; `path` may be a folder then."""
        json_bytes = read_bytes(path) if content is None else content
        self._content = content
        try:
            self.tokenizer = tokenizers.Tokenizer.from_buffer(json_bytes)
        except Exception as error:  # the tokenizers library raises bare Exception for any malformed file
            raise DataError(
                f"{path}: file must be a Hugging Face tokenizer.json, got one that does not parse ({error}). "
                "Pass the tokenizer.json written by save_pretrained of a fast tokenizer."
            ) from error
        self.path = path
        self._refuse_equal_added_tokens()
        self.splits_special_tokens = _splits_special_tokens(path if path.is_dir() else path.parent)
        self.tokenizer.encode_special_tokens = self.splits_special_tokens
        self.sha256 = _hash_definition(json_bytes, splits_special_tokens=self.splits_special_tokens)
        # A tokenizer.json may ask for both, for inference. Here every text must give all its ids, and no others.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Not the number of entries: ids may have gaps, and embeddings have a row for every id up to the largest.
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(
                f"{path}: ids must fit in 32 bits, got {self.vocab_size - 1:,}. Repair the vocabulary of the file."
            )
        self.special_tokens = (
            SpecialTokens(path) if path.is_dir() else find_special_tokens(path, self.tokenizer.token_to_id)
        )

    def _refuse_equal_added_tokens(self) -> None:
        """Where two are one text once it is normalised, the library takes either of them, by chance at each loading."""
        normalizer = self.tokenizer.normalizer
        texts: dict[str, str] = {}
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if normalizer is None or not token.normalized:
                continue
            other = texts.setdefault(normalizer.normalize_str(token.content), token.content)
            if other != token.content:
                raise DataError(
                    f"{self.path}: added tokens must differ once they are normalised, got {other!r} and "
                    f"{token.content!r}, of which tokenizers finds either by chance. Set normalized to false for one."
                )

    def read_definition(self) -> bytes:
        """The tokenizer.json that this was made from."""
        return self.path.read_bytes() if self._content is None else self._content

    def encode(self, text: str) -> np.ndarray:
        # Without the ids that a post-processor would add: preprocessing adds bos and eod itself.
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except BaseException as error:
            # A defect inside the library, such as an added token that begins in the white space that another one takes.
            if type(error).__name__ != RUST_PANIC:
                raise
            raise DataError(
                f"{self.path}: tokenizers must encode {text[:60]!r}, got an error inside that library ({error}). "
                "Check lstrip and rstrip of the added tokens."
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        plain_ids = [int(token_id) for token_id in ids]
        for token_id in plain_ids:
            # tokenizers leaves out unknown ids without an error; sentencepiece raises for them.
            if not 0 <= token_id < self.vocab_size:
                raise IndexError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self.tokenizer.decode(plain_ids, skip_special_tokens=False)


class DeferredEncoder(Encoder):
    """The facts of `encoder`; its file is read again when this is first asked to encode or decode.

    For a process that needs the facts at once, but rarely encodes. Can be sent to another process.
    """

    def __init__(self, encoder: Encoder):
        copy_facts(encoder, self)
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The libraries' objects cannot be pickled, and the file is small enough to be read again.
        return vars(self) | {"_encoder": None}

    def encode(self, text: str) -> np.ndarray:
        return self._load().encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._load().decode(ids)

    def _load(self) -> Encoder:
        if self._encoder is None:
            self._encoder = load_encoder(self.path)
        return self._encoder


def copy_facts(source: Encoder, target: Encoder) -> None:
    """Copy the facts of an encoder to one that replaces it."""
    target.path, target.sha256, target.vocab_size = source.path, source.sha256, source.vocab_size
    target.special_tokens = source.special_tokens


def load_encoder(path: str | Path) -> Encoder:
    """Read a SentencePiece `.model`, a `tokenizer.json`, or a folder that holds one of them.

    Raises DataError if nothing is there, or if it is not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        folder, path = path, _find_in_folder(path)
        if path.suffix != ".json":
            return _load_sentencepiece_folder(folder, path)
    if not path.exists():
        raise DataError(
            f"{path}: tokenizer does not exist. Pass a SentencePiece .model, a tokenizer.json, or its folder."
        )
    return HuggingFaceEncoder(path) if path.suffix == ".json" else SentencePieceEncoder(path)


def hash_tokenizer(path: str | Path) -> str:
    """The `sha256` of `load_encoder(path)`. A tokenizer.json, which takes seconds to load, is only read.

    Raises DataError as `load_encoder` does, except for a tokenizer.json that is none.
    """
    path = Path(path)
    file = _find_in_folder(path) if path.is_dir() else path
    if file.suffix != ".json":
        return load_encoder(path).sha256
    return _hash_definition(read_bytes(file), splits_special_tokens=_splits_special_tokens(file.parent))


def _splits_special_tokens(folder: Path) -> bool:
    return bool(read_config(folder / CONFIG_NAME).get("split_special_tokens"))


def _hash_definition(definition: bytes, *, splits_special_tokens: bool) -> str:
    """The setting changes ids, so it is a part of what manifests record."""
    return hashlib.sha256(definition + (b"split_special_tokens" if splits_special_tokens else b"")).hexdigest()


def _load_sentencepiece_folder(folder: Path, model_path: Path) -> Encoder:
    """A folder without tokenizer.json. Files beside tokenizer.model may name its tokens otherwise, and add others."""
    encoder = SentencePieceEncoder(model_path)
    if list_named_tokens(folder) <= encoder.list_pieces().keys():
        named = find_special_tokens(model_path, encoder.list_pieces().get)
        encoder.special_tokens.ids |= named.ids
        encoder.special_tokens.problems |= named.problems
        return encoder
    return load_through_transformers(folder)


def load_through_transformers(folder: Path) -> HuggingFaceEncoder:
    """The tokenizer that transformers makes of a folder without tokenizer.json, by rules of its own for each class.

    Raises DataError if transformers cannot load it, or has no tokenizer of the `tokenizers` library for it.
    """
    try:
        tokenizer = load_with_transformers(folder)
        definition = tokenizer.backend_tokenizer.to_str().encode()
    except (ConversionError, AttributeError) as error:
        raise DataError(
            f"{folder}: the files beside tokenizer.model must be known to transformers, got {error}. "
            "Pass tokenizer.model itself to leave them out."
        ) from error
    encoder = HuggingFaceEncoder(folder, definition)
    encoder.special_tokens.ids |= {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    return encoder


def require_eod_id(encoder: Encoder) -> int:
    """Return the id that ends a document; raises DataError if the tokenizer has none."""
    if encoder.eod_id is None:
        raise DataError(
            f"{encoder.path}: tokenizer must have an end-of-document token, got none. "
            "Name it as eos_token in tokenizer_config.json beside it, or leave out --append-eod."
        )
    return encoder.eod_id


def _find_in_folder(folder: Path) -> Path:
    # tokenizer.json first: beside it, tokenizer.model is often only what it was converted from.
    for name in ("tokenizer.json", "tokenizer.model"):
        if is_present(folder / name):
            return folder / name
    raise DataError(
        f"{folder}: folder must hold tokenizer.json or tokenizer.model, got neither. "
        "Pass the tokenizer file itself, or save a fast tokenizer there."
    )


def _not_a_model(path: Path) -> DataError:
    return DataError(
        f"{path}: file must be a SentencePiece model, got something else. "
        "Pass a .model file, or a tokenizer.json for a Hugging Face tokenizer."
    )
