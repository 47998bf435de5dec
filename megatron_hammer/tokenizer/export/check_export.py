"""Compare a written tokenizer folder with the original tokenizer, through transformers, as users load it.

A folder can be right for the `tokenizers` library and wrong for users: transformers may rebuild the tokenizer from
parts of the folder by rules of its own. So the result of `AutoTokenizer.from_pretrained` is compared.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.corpus.readers import Document, batch_documents
from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, SentencePieceEncoder
from megatron_hammer.tokenizer.encoding.transformers_tokenizer import load_with_transformers

SHOWN_CHARS = 60


@dataclass(slots=True)
class CheckedTexts:
    """How much text both tokenizers encoded and decoded alike."""

    num_documents: int = 0
    text_bytes: int = 0
    num_tokens: int = 0


def verify_with_transformers(
    encoder: Encoder,
    folder: Path,
    documents: Iterable[Document],
    on_document: Callable[[int], None] = lambda num_documents: None,
) -> CheckedTexts:
    """Compare ids, and text decoded from them, of every document; memory for one batch.

    A SentencePiece model's export must give its ids as called by default; of a copied Hugging Face tokenizer the tokens
    that its template adds around each text are left out. Documents with an unknown character are not decoded:
    sentencepiece writes " ⁇ " there, transformers the token's name.
    Raises ConversionError at the first difference, naming file:line and the first piece that differs.
    """
    tokenizer = load_with_transformers(folder)
    checked = CheckedTexts()
    # Users call the tokenizer with its defaults, so the export is compared in the same way.
    adds_special_tokens = isinstance(encoder, SentencePieceEncoder)
    for batch in batch_documents(documents):
        texts = [document.text for document in batch]
        expected = _encode_batch(encoder, texts)
        got = tokenizer(texts, add_special_tokens=adds_special_tokens, verbose=False)["input_ids"]
        # Ids before texts: two different ids may decode to the same text.
        for document, expected_ids, got_ids in zip(batch, expected, got, strict=True):
            if got_ids != expected_ids:
                raise _differs_in_ids(document, expected_ids, got_ids, tokenizer)
            if tokenizer.unk_token_id not in expected_ids:
                _check_decoded(document, encoder.decode(expected_ids), tokenizer.decode(got_ids))
            checked.num_documents += 1
            checked.text_bytes += len(document.text.encode("utf-8"))
            checked.num_tokens += len(expected_ids)
        on_document(checked.num_documents)
    return checked


def _encode_batch(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    ids, lengths = encoder.encode_batch(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def _differs_in_ids(document: Document, expected: list[int], got: list[int], tokenizer: Any) -> ConversionError:
    position = next(n for n, (a, b) in enumerate(itertools.zip_longest(expected, got)) if a != b)
    return ConversionError(
        f"{document.source}:{document.line}: transformers must encode the text as the original does, "
        f"got {_name_piece(tokenizer, got, position)} for {_name_piece(tokenizer, expected, position)} "
        f"at token {position} of {document.text[:SHOWN_CHARS]!r}. Nothing was written; encode with the original."
    )


def _name_piece(tokenizer: Any, ids: list[int], position: int) -> str:
    if position >= len(ids):
        return "nothing"
    return f"{tokenizer.convert_ids_to_tokens(ids[position])!r} (id {ids[position]})"


def _check_decoded(document: Document, expected: str, got: str) -> None:
    if got == expected:
        return
    position = next(n for n, (a, b) in enumerate(itertools.zip_longest(expected, got)) if a != b)
    raise ConversionError(
        f"{document.source}:{document.line}: transformers must decode the ids as the original does, "
        f"got {got[position : position + SHOWN_CHARS]!r} for {expected[position : position + SHOWN_CHARS]!r} "
        f"at character {position}. Nothing was written; decode with the original."
    )
