"""The text of an indexed pair's documents: one of them, a sample, and those that contain a text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.data.indexed.documents import read_pair_documents
from megatron_hammer.data.indexed.index_format import IDX_HEADER_BYTES, LENGTH_BYTES
from megatron_hammer.data.indexed.manifest import Manifest
from megatron_hammer.data.indexed.pair import IndexSummary
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder

CHUNK_BYTES = 4 << 20
# What decoders write for bytes that are not UTF-8: a token that is a part of a character.
REPLACEMENT_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentText:
    """A document, by its number in the pair from 0, as text."""

    number: int
    num_tokens: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchMatch:
    """A document that contains the text, `position` characters from its start, with an excerpt around it."""

    number: int
    position: int
    excerpt: str


def require_same_tokenizer(prefix: str | Path, encoder: Encoder, manifest: Manifest | None) -> None:
    """Raises DataError if the manifest says that another tokenizer encoded the pair."""
    if manifest is None or manifest.tokenizer.sha256 == encoder.sha256:
        return
    # With another tokenizer the text would be wrong without any error.
    made, given = manifest.tokenizer, encoder
    raise DataError(
        f"{prefix}: pair must be read with the tokenizer that encoded it, {made.name} ({made.sha256[:12]}...), "
        f"got {given.path} ({given.sha256[:12]}...). Pass the former as --tokenizer-model."
    )


def read_document_ids(index: IndexSummary, number: int) -> np.ndarray:
    """Return the ids of one document: [num_tokens], memory mapped. Raises ConfigError if there is no such document."""
    if not 0 <= number < index.num_documents:
        last = f"must lie in 0..{index.num_documents - 1}" if index.num_documents else "needs a pair that holds any"
        raise ConfigError(f"document: {last}, got {number}. Choose one of {index.idx_path}.")
    first, end = (int(entry) for entry in index.document_index[number : number + 2])
    if first == end:
        return np.empty(0, dtype=index.dtype)
    # The stored offset, because summing all lengths before the document would read the whole index.
    offset_bytes = np.memmap(
        index.idx_path,
        dtype=np.int64,
        mode="r",
        offset=IDX_HEADER_BYTES + LENGTH_BYTES * index.num_sequences,
        shape=(index.num_sequences,),
    )[first]
    start = int(offset_bytes) // index.dtype.itemsize
    return index.tokens[start : start + int(np.sum(index.sequence_lengths[first:end], dtype=np.int64))]


def read_document(index: IndexSummary, encoder: Encoder, number: int) -> DocumentText:
    """Return one document as text; raises ConfigError if there is none, DataError for ids beyond the vocabulary."""
    ids = read_document_ids(index, number)
    return DocumentText(number=number, num_tokens=len(ids), text=_decode(index, encoder, ids, number))


def choose_samples(index: IndexSummary, num_samples: int, seed: int) -> tuple[int, ...]:
    """Return the numbers of random documents in ascending order, all where there are no more; the seed decides."""
    count = min(num_samples, index.num_documents)
    # range, not a list: sampling from it takes no memory for the numbers.
    return tuple(sorted(random.Random(seed).sample(range(index.num_documents), count)))


def search_documents(
    index: IndexSummary, encoder: Encoder, text: str, *, max_matches: int, num_context_characters: int = 40
) -> Iterator[SearchMatch]:
    """Yield the documents that contain `text` exactly, in order, until there are `max_matches`.

    Every document is decoded, so a text is found wherever the tokenizer cut it. Raises ConfigError for an empty text.
    """
    if not text:
        raise ConfigError("search: text must not be empty, got ''. Pass what to look for.")
    number = num_matches = 0
    for documents in read_pair_documents(index, chunk_bytes=CHUNK_BYTES):
        for start, end in zip(documents.token_starts.tolist(), documents.token_ends.tolist(), strict=True):
            decoded = _decode(index, encoder, documents.ids[start:end], number)
            position = decoded.find(text)
            if position >= 0:
                excerpt = cut_excerpt(decoded, position, position + len(text), num_context_characters)
                yield SearchMatch(number=number, position=position, excerpt=excerpt)
                num_matches += 1
                if num_matches == max_matches:
                    return
            number += 1


def cut_excerpt(text: str, start: int, end: int, num_context_characters: int) -> str:
    """Return text[start:end] with some characters on either side, on one line, with ... where something was cut."""
    begin, stop = max(0, start - num_context_characters), min(len(text), end + num_context_characters)
    excerpt = " ".join(text[begin:stop].split())
    return f"{'...' if begin else ''}{excerpt}{'...' if stop < len(text) else ''}"


def describe_ids(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """Return what each id decodes to, as a Python literal; a part of a character, or a control token, as `id N`."""
    descriptions = []
    for token_id in ids:
        text = encoder.decode([token_id])
        is_readable = text and REPLACEMENT_CHARACTER not in text
        descriptions.append(repr(text) if is_readable else f"id {token_id}, no text of its own")
    return descriptions


def _decode(index: IndexSummary, encoder: Encoder, ids: np.ndarray, number: int) -> str:
    try:
        return encoder.decode(ids)
    except IndexError as error:
        raise DataError(
            f"{index.bin_path}: document {number} must have ids below vocab_size={encoder.vocab_size}, "
            f"got id={int(ids.max())}. It is damaged or was made with another tokenizer; check it with --verify."
        ) from error
