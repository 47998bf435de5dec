"""The texts that models are compared on: a domain is an input that the preprocessor reads, or a .bin/.idx pair."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.corpus.readers import Document, read_documents
from megatron_hammer.data.indexed.manifest import read_manifest
from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.inspect.document_text import read_document_ids, require_same_tokenizer
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.scorers.named_models import split_name
from megatron_hammer.tokenizer.encoding.encoder import Encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """Documents with text. note: how many there are, of which input, and what of it was left out."""

    name: str
    documents: tuple[Document, ...]
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainOptions:
    """json_key: the field or column of the text. max_characters, max_documents: None for no limit.

    pair_encoder: the tokenizer by which .bin/.idx pairs were encoded.
    """

    json_key: str = "text"
    max_characters: int | None = None
    max_documents: int | None = None
    pair_encoder: Encoder | None = None


def name_domains(texts: Sequence[str], *, flag: str) -> list[tuple[str, str]]:
    """Name and input of every domain of a command line; raises ConfigError if two have one name.

    texts: [NAME=]INPUT. flag: where they stand, for the message.
    """
    named = [(name or Path(source).name.split(".")[0], source) for name, source in map(split_name, texts)]
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{flag}: names must differ, got {twice[0]} twice. Pass NAME=INPUT.")
    return named


def read_domain(name: str, source: str, options: DomainOptions) -> Domain:
    """Read the documents of a file, a glob, a folder or the prefix of a pair.

    Raises DataError if it cannot be read or has no text, ConfigError for a pair without pair_encoder.
    """
    found = _read_pair(source, options.pair_encoder) if is_pair(source) else read_documents([source], options.json_key)
    documents, num_skipped = [], 0
    for document in itertools.islice(found, options.max_documents):
        text = document.text[: options.max_characters]
        num_skipped += not text
        if text:
            documents.append(Document(text, document.source, document.line))
    if not documents:
        raise DataError(f"{source}: domain {name} must have text, got {num_skipped} empty documents. Check the input.")
    cut = "" if options.max_characters is None else f", each to its character {options.max_characters:,}"
    skipped = f"; {num_skipped:,} empty ones left out" if num_skipped else ""
    note = f"{name}: {len(documents):,} documents of {source}{cut}{skipped}"
    return Domain(name=name, documents=tuple(documents), note=note)


def is_pair(source: str) -> bool:
    """Whether it is the prefix of a .bin/.idx pair."""
    return Path(f"{source}.idx").is_file()


def _read_pair(prefix: str, encoder: Encoder | None) -> Iterator[Document]:
    """The documents as text, without the BOS and the end-of-document tokens that the preprocessor adds."""
    if encoder is None:
        raise ConfigError(
            f"{prefix}: a pair needs the tokenizer that encoded it, got none. Pass it with --data-tokenizer."
        )
    require_same_tokenizer(prefix, encoder, read_manifest(prefix))
    index = read_index(prefix)
    for number in range(index.num_documents):
        ids = read_document_ids(index, number).tolist()
        ids = ids[bool(ids and ids[0] == encoder.bos_id) :]
        ids = ids[: len(ids) - bool(ids and ids[-1] == encoder.eod_id)]
        try:
            text = encoder.decode(ids)
        except IndexError as error:
            raise DataError(f"{prefix}: document {number}: {error}. Pass its own tokenizer.") from error
        yield Document(text, f"{prefix}.idx", number + 1)
