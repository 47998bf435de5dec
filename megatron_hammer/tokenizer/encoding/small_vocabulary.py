"""A tokenizer.json with a part of its vocabulary: the same rules, built in a hundredth of the time.

Two libraries are compared on it at every start. What it keeps is whole: every piece is made by the merges that make it
in the full vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NUM_CHOSEN_MERGES = 1000
BYTE_TOKEN_LENGTH = len("<0x00>")


def shrink_vocabulary(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer with single characters, byte tokens, added tokens, and about NUM_CHOSEN_MERGES of its merges.

    The merges lie evenly over the list, with those that make their parts. Ids are numbered anew, in the old order.
    """
    model = definition["model"]
    merges = [_split_merge(merge) for merge in model["merges"]]
    kept = _close(merges, merges[:: max(1, len(merges) // NUM_CHOSEN_MERGES)])
    added = definition.get("added_tokens") or []
    named = {token["content"] for token in added} | {model.get("unk_token")}
    texts = [text for text in model["vocab"] if len(text) == 1 or text in kept or text in named or _is_byte_token(text)]
    vocabulary = {text: number for number, text in enumerate(sorted(texts, key=model["vocab"].__getitem__))}
    return {
        **definition,
        "model": {
            **model,
            "vocab": vocabulary,
            "merges": [pair for pair in merges if "".join(pair) in vocabulary and set(pair) <= vocabulary.keys()],
        },
        "added_tokens": list(_renumber(added, vocabulary)),
    }


def write_merges_as_text(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer with each merge as one text, which is read in two thirds of the time of a pair."""
    model = definition["model"]
    merges = [_split_merge(merge) for merge in model["merges"]]
    # A space between two parts tells them apart only if no part has one.
    if any(" " in left or " " in right for left, right in merges):
        return dict(definition)
    return {**definition, "model": {**model, "merges": [f"{left} {right}" for left, right in merges]}}


def _split_merge(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _close(merges: Sequence[tuple[str, str]], chosen: Sequence[tuple[str, str]]) -> set[str]:
    """The results of `chosen`, of the merges that make their parts, and so on."""
    parts = {left + right: (left, right) for left, right in merges}
    kept: set[str] = set()
    pending = ["".join(pair) for pair in chosen]
    while pending:
        text = pending.pop()
        if text in parts and text not in kept:
            kept.add(text)
            pending += parts[text]
    return kept


def _is_byte_token(text: str) -> bool:
    return len(text) == BYTE_TOKEN_LENGTH and text.startswith("<0x")


def _renumber(added: Sequence[Mapping[str, Any]], vocabulary: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """A token that is not in the vocabulary gets the next free id, as `tokenizers` gives it."""
    next_id = len(vocabulary)
    for token in added:
        if token["content"] in vocabulary:
            yield {**token, "id": vocabulary[token["content"]]}
        else:
            yield {**token, "id": next_id}
            next_id += 1
