"""Compares llama.cpp's tokens of real text with those of the tokenizer that a GGUF file stands for.

llama.cpp has its own tokenizers. They are known to differ where a text holds two symbols that overlap, a control token
spelt out, a symbol that looks like one, or characters that a normaliser composes. A difference is listed with its cause
only if the cause gives these very tokens: symbols that were cut in another way, the control token in place of its text,
the text in place of the symbol, the space after a symbol, or the tokenizer's own tokens once the text is composed. Any
other difference means that the vocabulary is written wrongly.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_hammer.checkpoint.gguf.tokenizer import GgufVocabulary
from megatron_hammer.corpus.readers import Document
from megatron_hammer.tokenizer.encoding.sentencepiece_model import WHITESPACE_SYMBOL, PieceType

OVERLAP = "symbols that overlap: llama.cpp takes the longest of the text first, the tokenizer the first from the left"
SPELT_OUT = "a control token spelt out: llama.cpp merges pieces to it, the tokenizer leaves it text"
PREFIX = "a symbol and a space prefix: llama.cpp puts a space after every symbol, the tokenizer before the text only"
LEADING = "a space prefix and a space at the start: llama.cpp and sentencepiece have two there, transformers has one"
COMPOSED = "characters that the tokenizer composes (NFC) and llama.cpp does not"
TURN_END = "a symbol such as <|im_end|>: llama.cpp makes it a control token, which is found in conversations only"
UNEXPLAINED = "no known cause"
# llama.cpp knows ends of turns by their texts, whatever their type in the file. Source: llama_vocab::impl::load,
# "control-looking token". Which symbols it changes, special_token_check.py asks it.
CONTROL_FORM = re.compile(r"<[|｜][^<>\s]+[|｜]>|<\w+_of_\w+>")
CONTEXT_TOKENS = 2  # on each side of a difference: the symbols that cause it may begin or end in equal tokens
SHOWN_TOKENS = 8  # of a difference, in an example


@dataclass(frozen=True, kw_only=True, slots=True)
class IdDifference:
    """The first place of a document where the two differ. cause: one of this module's."""

    source: str
    line: int
    cause: str
    expected: tuple[str, ...]
    got: tuple[str, ...]


@dataclass(slots=True)
class TokenizerComparison:
    """How many documents, tokens and differing documents there were, and each difference."""

    num_documents: int = 0
    num_tokens: int = 0
    differences: list[IdDifference] = field(default_factory=list)

    def count_causes(self) -> dict[str, int]:
        """Documents by the cause of their difference."""
        return Counter(difference.cause for difference in self.differences)


def compare_tokenizers(
    vocabulary: GgufVocabulary,
    tokenize: Callable[[str], list[int]],
    documents: Iterable[Document],
    on_document: Callable[[int], None] = lambda num_documents: None,
) -> TokenizerComparison:
    """Encode every document both ways; `tokenize` is llama.cpp's."""
    comparison = TokenizerComparison()
    causes = _KnownCauses(vocabulary)
    for document in documents:
        expected = vocabulary.encoder.encode(document.text).tolist()
        got = tokenize(document.text)
        comparison.num_documents += 1
        comparison.num_tokens += len(expected)
        if expected != got:
            comparison.differences.append(_describe(document, expected, got, tokenize, causes))
        on_document(comparison.num_documents)
    return comparison


@dataclass(frozen=True, slots=True)
class _Place:
    """The ids of both sides for a part of the text that both cut out, and a few around it; where the first begins."""

    begin: int
    expected: list[int]
    got: list[int]


def _describe(
    document: Document,
    expected: list[int],
    got: list[int],
    tokenize: Callable[[str], list[int]],
    causes: "_KnownCauses",
) -> IdDifference:
    """The first unexplained place, or the first one if all are explained."""
    vocabulary = causes.vocabulary
    composed = unicodedata.normalize("NFC", document.text)
    first = _list_places(expected, got, vocabulary)[0]
    explained = [(COMPOSED, first)]
    if vocabulary.model == "gpt2" and composed != document.text:
        # What is left when llama.cpp gets the composed text has another cause.
        got = tokenize(composed)
    if causes.adds_prefix and document.text[:1] in (" ", WHITESPACE_SYMBOL):
        # Likewise without the space that is the prefix for transformers; of no text there is nothing to ask.
        rest, doubled = document.text[1:], WHITESPACE_SYMBOL + causes.join(expected)
        explained = [(LEADING, first)]
        got = tokenize(rest) if rest else expected if causes.join(got) == doubled else got
    places = _list_places(expected, got, vocabulary)
    # Of the whole document, because spaces that only one side has move all places behind them.
    if places and causes.differs_in_prefixes(expected, got):
        explained = [(PREFIX, first)]
    elif places:
        explained = [(causes.explain(place), place) for place in places]
    # One unexplained place fails the document, so it must not be hidden by an explained one before it.
    cause, shown = next((found for found in explained if found[0] == UNEXPLAINED), explained[0])
    expected_tokens, got_tokens = (
        tuple(vocabulary.tokens[number] for number in ids[:SHOWN_TOKENS]) for ids in (shown.expected, shown.got)
    )
    return IdDifference(
        source=document.source,
        line=document.line,
        cause=cause,
        expected=expected_tokens,
        got=got_tokens,
    )


def _list_places(expected: list[int], got: list[int], vocabulary: GgufVocabulary) -> list[_Place]:
    """Where the two differ: tokens between places of the text that both cut, and a few around them."""
    # Token counts may differ, so positions in the two lists cannot be compared. Positions in the text can.
    ends, other_ends = _measure_ends(expected, vocabulary), _measure_ends(got, vocabulary)
    cuts = np.intersect1d(ends, other_ends)
    # Index of the first token after each cut; with the beginning and the end, both lists have equally many bounds.
    bounds = [0, *(np.searchsorted(ends, cuts) + 1).tolist(), len(expected)]
    other_bounds = [0, *(np.searchsorted(other_ends, cuts) + 1).tolist(), len(got)]
    return [
        _Place(
            max(0, begin - CONTEXT_TOKENS),
            expected[max(0, begin - CONTEXT_TOKENS) : end + CONTEXT_TOKENS],
            got[max(0, other_begin - CONTEXT_TOKENS) : other_end + CONTEXT_TOKENS],
        )
        for begin, end, other_begin, other_end in zip(
            bounds[:-1], bounds[1:], other_bounds[:-1], other_bounds[1:], strict=True
        )
        if expected[begin:end] != got[other_begin:other_end]
    ]


def _measure_ends(ids: Sequence[int], vocabulary: GgufVocabulary) -> np.ndarray:
    """Where every token ends in the text, in bytes of the text with its spaces escaped."""
    return np.cumsum([_count_bytes(vocabulary, token_id) for token_id in ids], dtype=np.int64)


def _count_bytes(vocabulary: GgufVocabulary, token_id: int) -> int:
    text, kind = vocabulary.tokens[token_id], vocabulary.types[token_id]
    if kind is PieceType.BYTE:
        return 1
    if vocabulary.model == "gpt2" and kind is PieceType.NORMAL:
        return len(text)  # a character stands for a byte
    return len(text.replace(" ", WHITESPACE_SYMBOL).encode("utf-8"))


class _KnownCauses:
    """What llama.cpp is known to do in another way with this vocabulary, by the tokens that it gives."""

    def __init__(self, vocabulary: GgufVocabulary):
        self.vocabulary = vocabulary
        kinds = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.BYTE)
        self._symbols = self._find_ids(PieceType.USER_DEFINED)
        self._reserved = self._find_ids(*kinds)
        found = (PieceType.CONTROL, PieceType.UNKNOWN) if vocabulary.reads_control_tokens else ()
        self._cuts = self._symbols | self._find_ids(*found)  # each is found in a text before the rest is encoded
        self._overlaps = list_overlaps([vocabulary.tokens[token_id] for token_id in sorted(self._symbols)])
        self.adds_prefix = bool(vocabulary.adds_space_prefix)

    def explain(self, place: _Place) -> str:
        """The cause that accounts for the tokens of a place, from the most specific to the least."""
        text = self.vocabulary.encoder.decode(place.expected)
        if self._cuts_an_overlap(text, place):
            return OVERLAP
        if self._reads_a_reserved_token(text, place):
            return SPELT_OUT
        if self._leaves_control_forms(place):
            return TURN_END
        return PREFIX if self.differs_in_prefixes(place.expected, place.got) else UNEXPLAINED

    def differs_in_prefixes(self, expected: Sequence[int], got: Sequence[int]) -> bool:
        """The same symbols and the same text between them, but for the space that llama.cpp puts after every symbol.

        The tokenizer may put it there too, or only where the text has none.
        """
        if not self.adds_prefix:
            return False
        (symbols, parts), (other_symbols, others) = self._split(expected), self._split(got)
        return (symbols, parts[0]) == (other_symbols, others[0]) and all(
            other == part or other.removeprefix(WHITESPACE_SYMBOL) in (part, part.removeprefix(WHITESPACE_SYMBOL))
            for part, other in zip(parts, others, strict=True)
        )

    def join(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary.tokens[token_id] for token_id in ids)

    def _find_ids(self, *kinds: PieceType) -> set[int]:
        return {token_id for token_id, kind in enumerate(self.vocabulary.types) if kind in kinds}

    def _cuts_an_overlap(self, text: str, place: _Place) -> bool:
        """The same text cut into other symbols, where two of them overlap."""
        symbols, others = ([token_id for token_id in ids if token_id in self._symbols] for ids in _sides(place))
        return symbols != others and any(overlap in text for overlap in self._overlaps)

    def _leaves_control_forms(self, place: _Place) -> bool:
        """Symbols of that form have become their text, and nothing else is different."""
        lost = {token_id for token_id in place.expected if token_id in self._symbols and token_id not in place.got}
        is_same_text = self._join_text(place.expected) == self._join_text(place.got)
        return (
            bool(lost)
            and is_same_text
            and all(CONTROL_FORM.fullmatch(self.vocabulary.tokens[token_id]) for token_id in lost)
        )

    def _join_text(self, ids: Sequence[int]) -> str:
        return self.vocabulary.encoder.decode(list(ids))

    def _reads_a_reserved_token(self, text: str, place: _Place) -> bool:
        """A token in place of its text, which the tokenizer leaves text."""
        added = [token_id for token_id in place.got if token_id in self._reserved and token_id not in place.expected]
        return any(self.vocabulary.tokens[token_id] in text for token_id in added)

    def _split(self, ids: Sequence[int]) -> tuple[list[int], list[str]]:
        """The symbols, and the text before, between and behind them."""
        places = [place for place, token_id in enumerate(ids) if token_id in self._cuts]
        bounds = zip([-1, *places], [*places, len(ids)], strict=True)
        return [ids[place] for place in places], [self.join(ids[begin + 1 : end]) for begin, end in bounds]


def _sides(place: _Place) -> tuple[list[int], list[int]]:
    return place.expected, place.got


def list_overlaps(symbols: Sequence[str]) -> list[str]:
    """Every text in which one symbol begins inside another and ends behind it: "--->" of "---" and "-->"."""
    return sorted(
        {
            first + second[shared:]
            for first in symbols
            for second in symbols
            if first != second
            for shared in range(1, min(len(first), len(second)))
            if first.endswith(second[:shared])
        }
    )


def summarise_tokenizers(comparison: TokenizerComparison) -> tuple[str, bool]:
    """A sentence for the table, and whether every difference is explained."""
    counts = f"{comparison.num_documents:,} texts, {comparison.num_tokens:,} tokens"
    if not comparison.differences:
        return f"equal on {counts}", True
    causes = comparison.count_causes()
    listed = "; ".join(f"{count} with {cause}" for cause, count in causes.items())
    return f"{len(comparison.differences)} of {counts} differ: {listed}", UNEXPLAINED not in causes


def list_examples(comparison: TokenizerComparison, *, most: int) -> list[str]:
    """A line for each of the first differences of every cause."""
    lines: list[str] = []
    seen: Counter[str] = Counter()
    for difference in comparison.differences:
        seen[difference.cause] += 1
        if seen[difference.cause] <= most:
            lines.append(
                f"{difference.source}:{difference.line}: {difference.cause}; "
                f"{' '.join(map(repr, difference.expected))} became {' '.join(map(repr, difference.got))}"
            )
    return lines
