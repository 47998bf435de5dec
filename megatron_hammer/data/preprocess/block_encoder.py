"""Encode blocks of documents as token ids: the part of preprocessing that runs in the workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hammer.corpus.blocks import Block, Position, decode_block
from megatron_hammer.data.indexed.pair import select_dtype
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.data.preprocess.sentences import load_sentence_splitter
from megatron_hammer.data.preprocess.template import NO_TEMPLATE, Template
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, require_eod_id
from megatron_hammer.tokenizer.encoding.fast_encoder import EncoderChoice

# Joined and as UTF-16, a text takes up to eight bytes more per character: 32 MiB here.
MAX_COUNTED_CHARS = 1 << 22


@dataclass(frozen=True, slots=True)
class EncodedField:
    """One field of a block's documents.

    ids: [num_tokens] in the output's dtype. sequence_lengths: [num_sequences] int32, all above 0.
    sequences_per_document: [num_documents] int64. text_bytes: of all texts, as UTF-8.
    """

    ids: np.ndarray
    sequence_lengths: np.ndarray
    sequences_per_document: np.ndarray
    text_bytes: int


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """The fields of a block in the order of `json_keys`; problems as in DecodedBlock."""

    begin: Position
    end: Position
    fields: tuple[EncodedField, ...]
    problems: tuple[tuple[int, str], ...]


class BlockEncoder:
    """Made once in each worker, because reading a tokenizer is slow. Raises DataError if it lacks a needed token."""

    def __init__(self, options: PreprocessOptions, encoder: Encoder, template: Template = NO_TEMPLATE):
        self._encoder = encoder
        self._template = template
        self._json_keys = options.json_keys
        self._dtype = select_dtype(encoder.vocab_size)
        self._before = [require_bos_id(encoder)] if options.prepend_bos else []
        self._after = [require_eod_id(encoder)] if options.append_eod else []
        self._split: Callable[[str], list[str]] | None = None
        if options.split_sentences:
            self._split = load_sentence_splitter(options.language, keep_newlines=options.keep_newlines)

    def encode(self, block: Block) -> EncodedBlock:
        decoded = decode_block(block, self._json_keys)
        begin, end = block.begin, block.end
        del block  # frees the payload, which may be large, before the next steps need memory
        fields = tuple(self._encode_field(texts) for texts in decoded.columns)
        return EncodedBlock(begin, end, fields, decoded.problems)

    def _encode_field(self, texts: list[str]) -> EncodedField:
        text_bytes = count_utf8_bytes(texts)
        # Without sentences, every document is one of them: what follows treats both cases alike.
        sentences_per_document = np.ones(len(texts), dtype=np.int64)
        if self._split is not None:
            split_texts = [self._split(text) for text in texts]
            sentences_per_document = np.array([len(sentences) for sentences in split_texts], dtype=np.int64)
            texts = [sentence for sentences in split_texts for sentence in sentences]
        ids, lengths = self._encoder.encode_batch(texts)
        # Around every text, also an empty one, which has tokens then.
        every_text = np.arange(1, len(texts) + 1)
        template = self._template
        ids, lengths = add_ends(ids, lengths, every_text, before=template.before, after=template.after)
        is_kept = lengths > 0  # Megatron-LM's tool drops empty sentences, and adds no token to an empty document
        # How many sentences are kept before each one, so that document ends can be renumbered in one look-up.
        kept_before = np.concatenate(([0], np.cumsum(is_kept)))
        document_ends = kept_before[np.cumsum(sentences_per_document)]
        sequences_per_document = np.diff(document_ends, prepend=0)
        ids, lengths = add_ends(
            ids.astype(self._dtype, copy=False),
            lengths[is_kept],
            # An empty document gets neither bos nor eod, or it would no longer be empty.
            document_ends[sequences_per_document > 0],
            before=self._before,
            after=self._after,
        )
        return EncodedField(ids, lengths.astype(np.int32), sequences_per_document, text_bytes)


def count_utf8_bytes(texts: Sequence[str]) -> int:
    """The bytes of all texts as UTF-8; counted in their UTF-16 units, which is half the work of encoding them."""
    if sum(map(len, texts)) > MAX_COUNTED_CHARS:  # memory counts
        return sum(len(text.encode("utf-8")) for text in texts)
    joined = "".join(texts)
    if joined.isascii():
        return len(joined)
    # UTF-8 takes one byte more from U+0080 on, and another one from U+0800 on.
    units = np.frombuffer(joined.encode("utf-16-le"), dtype="<u2")
    num_pairs = len(units) - len(joined)  # a character beyond the basic plane: two units of three bytes each, but four
    return len(units) + int(np.count_nonzero(units >= 0x80)) + int(np.count_nonzero(units >= 0x800)) - 2 * num_pairs


def add_ends(
    ids: np.ndarray, lengths: np.ndarray, document_ends: np.ndarray, *, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Put tokens before and after each document, as parts of its first and last sequence.

    ids: [sum of lengths]. lengths: [num_sequences]. document_ends: [num_documents], the index of the sequence after
    each document; each has a sequence. Returns the new ids and lengths.
    """
    if not len(document_ends) or not (before or after):
        return ids, lengths
    document_starts = np.concatenate(([0], document_ends[:-1]))
    token_ends = np.concatenate(([0], np.cumsum(lengths)))
    places = [token_ends[document_starts]] * len(before) + [token_ends[document_ends]] * len(after)
    # The caller's array must not change.
    lengths = lengths.copy()
    lengths[document_starts] += len(before)
    lengths[document_ends - 1] += len(after)
    added = np.tile(np.array([*before, *after], dtype=ids.dtype), len(document_ends))
    return np.insert(ids, np.stack(places, axis=1).ravel(), added), lengths  # equal places keep their order


def require_bos_id(encoder: Encoder) -> int:
    """Return the id that begins a document; raises DataError if the tokenizer has none."""
    if encoder.bos_id is None:
        raise DataError(
            f"{encoder.path}: tokenizer must have a token that begins a document, got none. "
            "Name it as bos_token in tokenizer_config.json, or leave out --prepend-bos."
        )
    return encoder.bos_id


@dataclass(frozen=True, slots=True)
class BlockEncoderRecipe:
    """What a worker needs to build its encoder; can be sent to it."""

    options: PreprocessOptions
    choice: EncoderChoice
    template: Template = NO_TEMPLATE

    def __call__(self) -> Callable[[Block], EncodedBlock]:
        return BlockEncoder(self.options, self.choice.load(), self.template).encode
