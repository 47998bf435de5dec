"""sentencepiece's character map (nfkc, nfkc_cf, nmt_nfkc) as steps of the `tokenizers` library, exactly.

sentencepiece replaces the longest known sequence of characters at each place: a half-width kana with its mark, or a
letter with its accents. `tokenizers.normalizers.Precompiled` reads the same map, but looks up one grapheme of less than
six bytes, or else single characters, and drops the accents of some letters. So the map is taken apart: single
characters are looked up with Precompiled, where a separator on each side makes each a grapheme of its own; then an
expression finds the sequences, and NFC composes them.
`list_charsmap_steps` refuses a map that does not come apart in this way.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from megatron_hammer.errors import ConversionError

# Noncharacters, which no text should hold; where one does, it is escaped first.
BARRIER, CUT, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
ESCAPES = {ESCAPE: f"{ESCAPE}0", BARRIER: f"{ESCAPE}1", CUT: f"{ESCAPE}2"}
ANY_CHARACTER = r"[\s\S]"
NUM_TEXTS = 300
MAX_PARTS = 30
# What random parts of the map do not hold: joiners, spaces, and the characters used here.
OTHER_CHARS = tuple("ab \u3000\u00a0\u200c\u200d\u0301\u0323\u0345\uff9e\uff9f\u3099\r\n" + BARRIER + CUT + ESCAPE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Charsmap:
    """single: characters and what replaces each. sequences: of two and more characters.

    bases: for every character of a sequence, its compatibility form before letters are folded.
    composed: for every sequence written in bases, what replaces it.
    """

    single: Mapping[str, str]
    sequences: Mapping[str, str]
    bases: Mapping[str, str]
    composed: Mapping[str, str]

    def replace_each(self, text: str) -> str:
        return "".join(self.single.get(char, char) for char in text)

    @property
    def firsts(self) -> set[str]:
        return {sequence[0] for sequence in self.sequences}

    @property
    def followers(self) -> set[str]:
        return {char for sequence in self.sequences for char in sequence[1:]}


def list_charsmap_steps(precompiled: bytes, name: str) -> list[Any]:
    """The normalisers that replace what sentencepiece replaces by `precompiled`, in order.

    Raises ConversionError, calling the model `name`, for a map that they cannot express.
    """
    charsmap = _read_charsmap(precompiled)
    compose = normalizers.NFC()
    # Where NFC does something else: characters that are newer than the library, and letters that are folded twice.
    exceptions = {
        text: result
        for text, result in charsmap.composed.items()
        if charsmap.replace_each(compose.normalize_str(text)) != result
    }
    if reason := _find_obstacle(charsmap, compose):
        raise ConversionError(
            f"{name}: tokenizer must be one that Hugging Face can express exactly, got a normaliser in which {reason}. "
            "Pass --no-tokenizer and encode with sentencepiece."
        )
    marks = {text: f"{ESCAPE}9{number:04d}" for number, text in enumerate(exceptions)}
    return [
        *(normalizers.Replace(char, escape) for char, escape in ESCAPES.items()),
        *(normalizers.Replace(text, BARRIER.join(text)) for text in _list_kept_sequences(charsmap)),
        normalizers.Replace(tokenizers.Regex(rf"{ANY_CHARACTER}\K"), CUT),
        normalizers.Precompiled(_compile(_map_to_bases(charsmap))),
        normalizers.Replace(CUT, ""),
        # What is between two cuts is composed, and nothing else: NFC would also compose and reorder across them.
        normalizers.Replace(tokenizers.Regex(rf"(?:{_find_sequences(charsmap)}{ANY_CHARACTER})\K"), CUT),
        compose,
        *(normalizers.Replace(text, mark) for text, mark in marks.items()),
        normalizers.Precompiled(_compile(charsmap.single)),
        normalizers.Replace(tokenizers.Regex(f"[{BARRIER}{CUT}]"), ""),
        *(normalizers.Replace(mark, exceptions[text]) for text, mark in marks.items()),
        *(normalizers.Replace(escape, char) for char, escape in reversed(ESCAPES.items())),
    ]


def list_normalized_texts(precompiled: bytes) -> Iterator[str]:
    """Random texts of everything that the map replaces, and of parts of it; the same ones every time."""
    charsmap = _read_charsmap(precompiled)
    sequences = list(charsmap.sequences)
    followers, firsts = sorted(charsmap.followers), sorted(charsmap.firsts)
    pools = [pool for pool in (list(charsmap.single), sequences, followers, firsts, OTHER_CHARS) if pool]
    draw = random.Random(9)
    for _ in range(NUM_TEXTS):
        yield "".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(1, MAX_PARTS)))


def _read_charsmap(precompiled: bytes) -> _Charsmap:
    spec = sentencepiece_model_pb2.NormalizerSpec(precompiled_charsmap=precompiled)
    rules = dict(sentencepiece.SentencePieceNormalizer(normalizer_spec=spec).decompile())
    single = {text: result for text, result in rules.items() if len(text) == 1}
    sequences = {text: result for text, result in rules.items() if len(text) > 1}
    fold_nothing = normalizers.NFKC()
    bases = {char: fold_nothing.normalize_str(char) for text in sequences for char in text}
    for char, base in bases.items():
        # A character that is newer than the library, unless the map only folds its case.
        if base == char and single.get(char, char) not in (char, char.lower(), char.casefold()):
            bases[char] = single[char]
    composed = {"".join(bases[char] for char in text): result for text, result in sequences.items()}
    return _Charsmap(single=single, sequences=sequences, bases=bases, composed=composed)


def _find_obstacle(charsmap: _Charsmap, compose: Any) -> str | None:
    """Why the steps would replace otherwise than the map, as the end of a sentence; None if they do not."""
    for char, base in charsmap.bases.items():
        if len(base) != 1 or charsmap.replace_each(base) != charsmap.single.get(char, char):
            return f"{char!r} has a form in sequences of its own"
    for text, result in charsmap.sequences.items():
        if charsmap.composed["".join(charsmap.bases[char] for char in text)] != result:
            return f"{text!r} is replaced otherwise than a sequence of the same forms"
    for char, result in charsmap.single.items():
        if charsmap.replace_each(result) != result or compose.normalize_str(result) != result:
            return f"{char!r} is replaced by what would be replaced again"
    unmapped = [
        char for code in range(0x110000) if (char := chr(code)) not in charsmap.single and _may_stand_in_text(code)
    ]
    if compose.normalize_str(CUT.join(unmapped)) != CUT.join(unmapped):
        return "a character is kept that NFC replaces"
    kept = tuple(_list_kept_sequences(charsmap))
    if any(text.startswith(kept) for text in charsmap.sequences):
        return "a sequence is kept that is the beginning of another"
    return None


def _may_stand_in_text(code: int) -> bool:
    return not 0xD800 <= code < 0xE000 and chr(code) != CUT  # surrogates; CUT is escaped before


def _list_kept_sequences(charsmap: _Charsmap) -> list[str]:
    """Sequences that the map leaves alone, though it replaces others of the same bases: "h" and a macron below it."""
    members: dict[str, list[str]] = defaultdict(list)
    for char, base in charsmap.bases.items():
        members[base].append(char)
    firsts, followers = charsmap.firsts, charsmap.followers
    return [
        text
        for composed in charsmap.composed
        for chars in itertools.product(
            [char for char in members[composed[0]] if char in firsts],
            *([char for char in members[base] if char in followers] for base in composed[1:]),
        )
        if (text := "".join(chars)) not in charsmap.sequences
    ]


def _map_to_bases(charsmap: _Charsmap) -> dict[str, str]:
    """Single characters to bases, or to the result with barriers where it would be taken for part of a sequence."""
    firsts, followers = charsmap.firsts, charsmap.followers
    first_bases = {charsmap.bases[char] for char in firsts}
    follower_bases = {charsmap.bases[char] for char in followers}
    mapping = {}
    for char in {*charsmap.single, *charsmap.bases, *charsmap.bases.values()}:
        result = charsmap.bases.get(char, charsmap.single.get(char, char))
        before = BARRIER if result[:1] in follower_bases and char not in followers else ""
        behind = BARRIER if result[-1:] in first_bases and char not in firsts else ""
        # A character that is removed must still stand between its neighbours.
        if (image := before + result + behind or BARRIER) != char:
            mapping[char] = image
    return mapping


def _find_sequences(charsmap: _Charsmap) -> str:
    """An expression for every sequence of bases, the longest first, and an alternative behind it."""
    endings: dict[str, list[str]] = defaultdict(list)
    for text in charsmap.composed:
        endings[text[0]].append(text[1:])
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for first, texts in endings.items():
        groups[tuple(sorted(texts, key=lambda text: (-len(text), text)))].append(first)
    return "".join(
        f"[{''.join(map(re.escape, firsts))}](?:{'|'.join(map(re.escape, texts))})|" for texts, firsts in groups.items()
    )


def _compile(mapping: Mapping[str, str]) -> bytes:
    normalizer = sentencepiece.SentencePieceNormalizer(norm_map=sorted(mapping.items()))
    spec = sentencepiece_model_pb2.NormalizerSpec.FromString(normalizer.serialized_normalizer_spec())
    precompiled: bytes = spec.precompiled_charsmap
    return precompiled
