"""Which tokenizer.json the fast encoder (fastokens) encodes exactly as `tokenizers` does, by its structure alone.

Both libraries find added tokens, normalise, cut into words and merge pairs. Each condition here belongs to one of these
steps; tests/unit/tokenizer/encoding/test_fastokens_conditions.py compares both libraries on everything that is allowed.
A sample of text proves nothing: added tokens may differ only where two of them meet.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_RULE = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
QWEN2_RULE = LLAMA3_RULE.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
GPT4O_RULE = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _TAIL,
    )
)
DEEPSEEK_RULES = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# The two libraries have different engines for regular expressions: by GPT-2's expression, fastokens takes U+180E for a
# space. So only expressions are allowed that fastokens has a program of its own for, compared on every character.
KNOWN_RULES = frozenset((LLAMA3_RULE, QWEN2_RULE, GPT4O_RULE, *DEEPSEEK_RULES))
EMPTY = (None, "", 0, 0.0, False)
STRIP_FLAGS = ("lstrip", "rstrip")
NUL = "\0"  # between contents, so that none is found across two of them


def list_conditions_not_met(definition: Mapping[str, Any], reference: tokenizers.Tokenizer) -> list[str]:
    """Why fastokens might encode otherwise than `reference`, which was made of `definition` (a tokenizer.json).

    Empty where its structure excludes every difference.
    """
    added = definition.get("added_tokens") or []
    return [
        *_list_unknown_normalizers(definition.get("normalizer")),
        *_list_unknown_pre_tokenizers(definition.get("pre_tokenizer")),
        *_list_model_problems(definition),
        *_list_added_token_problems(added, definition.get("normalizer"), reference),
    ]


def _list_unknown_normalizers(normalizer: Mapping[str, Any] | None) -> Iterator[str]:
    for step in _flatten(normalizer, "normalizers"):
        kind = step.get("type")
        # A pattern may also be a regular expression.
        is_plain_replace = kind == "Replace" and "String" in (step.get("pattern") or {})
        if not is_plain_replace and kind not in ("NFC", "Prepend"):
            yield f"its normaliser {kind} is unknown to the fast encoder"


def _list_unknown_pre_tokenizers(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    for step in _flatten(pre_tokenizer, "pretokenizers"):
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern") or {}
            is_known = pattern.get("Regex") in KNOWN_RULES and step.get("behavior") == "Isolated"
            is_plain = pattern.get("String") == " " and step.get("behavior") == "MergedWithPrevious"
            if not (is_known or is_plain) or step.get("invert"):
                yield "it splits text by a rule that was not compared with the fast encoder's"
        elif kind not in ("ByteLevel", "Digits"):
            yield f"its pre-tokenizer {kind} is unknown to the fast encoder"


def _flatten(step: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step.get("type") == "Sequence":
        for inner in step.get(key) or []:
            yield from _flatten(inner, key)
    else:
        yield step


def _list_model_problems(definition: Mapping[str, Any]) -> Iterator[str]:
    model = definition.get("model") or {}
    # Old files of GPT-2 do not name the type.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        yield f"its model is {model.get('type')}, not BPE"
        return
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting) not in EMPTY:
            yield f"its model has {setting}={model[setting]!r}"
    # Otherwise some characters have no piece, and the libraries drop or join those in different ways.
    steps = [*_flatten(definition.get("normalizer"), "normalizers")]
    steps += _flatten(definition.get("pre_tokenizer"), "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in steps):
        missing = [char for char in tokenizers.pre_tokenizers.ByteLevel.alphabet() if char not in model["vocab"]]
    elif model.get("byte_fallback"):
        missing = [name for byte in range(256) if (name := f"<0x{byte:02X}>") not in model["vocab"]]
    else:
        missing = ["every byte"]
    if missing:
        yield f"its vocabulary has no piece for {len(missing)} of the bytes"


def _list_added_token_problems(
    added: Sequence[Mapping[str, Any]], normalizer: Mapping[str, Any] | None, reference: tokenizers.Tokenizer
) -> Iterator[str]:
    """`tokenizers` looks for added tokens twice: first in the text as it is, then, for those with `normalized`, in what
    is left of it, normalised. fastokens does so only where there is a normaliser, and else looks for all at once.
    """
    contents = [token["content"] for token in added]
    if "" in contents or len(set(contents)) < len(contents):
        yield "an added token is empty or there twice"
    # `tokenizers` ignores the ids of the file where they are not the next free ones.
    if any(reference.token_to_id(token["content"]) != token["id"] for token in added):
        yield "an added token has an id that the reference does not give it"
    normalize = reference.normalizer.normalize_str if reference.normalizer is not None else str
    searched = [normalize(token["content"]) if token["normalized"] else token["content"] for token in added]
    normalized = [text for text, token in zip(searched, added, strict=True) if token["normalized"]]
    if "" in normalized or len(set(normalized)) < len(normalized):
        yield "two added tokens are the same after normalisation"
    if any(token["single_word"] for token in added):
        yield "an added token is found as a single word only (single_word)"
    strips = any(token[flag] for token in added for flag in STRIP_FLAGS)
    # One takes white space away that another would have been found in; the libraries disagree who comes first.
    if strips and any(char.isspace() for text in (*searched, *contents) for char in text):
        yield "an added token takes white space beside it (lstrip, rstrip), and another one contains white space"
    raw = [text for text, token in zip(searched, added, strict=True) if not token["normalized"]]
    if normalizer is None and raw and normalized:
        if strips:
            yield "added tokens are looked for in two rounds (normalized) and take white space beside them"
        if _can_overlap(raw, normalized):
            yield "two added tokens of different rounds (normalized) can overlap in a text"


def _can_overlap(raw: Sequence[str], normalized: Sequence[str]) -> bool:
    """Whether some text holds one of each so that they share a character."""
    starts = {text[:end] for text in normalized for end in range(1, len(text) + 1)}
    ends = {text[begin:] for text in normalized for begin in range(len(text))}
    joined_raw, joined_normalized = NUL.join(raw), NUL.join(normalized)
    return (
        any(text in joined_normalized for text in raw)
        or any(text in joined_raw for text in normalized)
        or any(text[begin:] in starts for text in raw for begin in range(len(text)))
        or any(text[:end] in ends for text in raw for end in range(1, len(text) + 1))
    )
