"""Every tokenizer.json that the conditions allow is encoded by fastokens as by `tokenizers`."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_hammer.tokenizer.encoding import fast_encoder
from megatron_hammer.tokenizer.encoding.encoder import Encoder, HuggingFaceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.fast_encoder import select_encoder
from megatron_hammer.tokenizer.encoding.fastokens_conditions import (
    DEEPSEEK_RULES,
    GPT4O_RULE,
    LLAMA3_RULE,
    QWEN2_RULE,
    list_conditions_not_met,
)
from tests.helpers.repository import ROOT

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = ("normalized", "lstrip", "rstrip", "single_word", "special")
# A token without flags, and one with flags: how their texts stand to each other decides who is found first.
CONTENTS = {
    "apart": ("<one>", "<two>"),
    "overlapping": ("<a><", "<b>"),
    "one in the other": ("<a>", "<a>b"),
    "white space": ("  ", "<b>"),
    "leading white space": ("<a>", " b"),
    "equal after NFC": ("\u1e69", "s\u0323\u0307"),
    "words": ("end", "friend"),
}
NORMALIZERS = (None, {"type": "NFC"})


def define(added: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    model = {"type": "BPE", "unk_token": None, "vocab": {char: n for n, char in enumerate(ALPHABET)}, "merges": []}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "model": model,
    } | parts


def name_token(number: int, content: str, **flags: bool) -> dict[str, Any]:
    return {"id": len(ALPHABET) + number, "content": content} | dict.fromkeys(FLAGS, False) | flags


def write(folder: Path, definition: dict[str, Any]) -> HuggingFaceEncoder:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    encoder = load_encoder(path)
    assert isinstance(encoder, HuggingFaceEncoder)
    return encoder


def list_texts(first: str, second: str) -> list[str]:
    atoms = (first, second, " ", "  ", "a", "_", "\n", "e\u0301", first[:1], second[-1:], second[1:])
    # A step that divides none of the counts: every atom meets every other in every place.
    return ["".join(parts) for parts in itertools.islice(itertools.product(atoms, repeat=3), 0, None, 7)]


def encode_all(encoder: Encoder, texts: list[str]) -> list[list[int] | str]:
    def encode(text: str) -> list[int] | str:
        try:
            return encoder.encode(text).tolist()
        except Exception as error:
            return type(error).__name__

    return [encode(text) for text in texts]


def list_combinations() -> Iterator[tuple[str, dict[str, bool], dict[str, Any] | None]]:
    for name in CONTENTS:
        for values in itertools.product((False, True), repeat=len(FLAGS)):
            for normalizer in NORMALIZERS:
                yield name, dict(zip(FLAGS, values, strict=True)), normalizer


def find_differing(encoder: Encoder, reference: Encoder, texts: list[str]) -> list[str]:
    pairs = zip(texts, encode_all(encoder, texts), encode_all(reference, texts), strict=True)
    return [text for text, got, expected in pairs if got != expected]


@pytest.mark.filterwarnings("ignore")
def test_every_combination_of_flags_gives_the_references_ids(tmp_path, monkeypatch, capfd):
    """And most of the combinations of ordinary models stay fast."""
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # the reference itself fails on some combinations
    fast: dict[str, int] = {}
    for name, flags, normalizer in list_combinations():
        first, second = CONTENTS[name]
        added = [name_token(0, first), name_token(1, second, **flags)]
        reference = write(tmp_path, define(added, normalizer=normalizer))
        choice = select_encoder(reference)
        if choice.definition is not None:
            fast[name] = fast.get(name, 0) + 1
            assert find_differing(choice.load(), reference, list_texts(first, second)) == [], (name, flags, normalizer)
        else:
            assert "The reference encodes instead" in choice.warning
    capfd.readouterr()
    # Of 64. Half have single_word. With a normaliser all others are fast; without one, those of one round, and those
    # of two rounds that cannot overlap and take no white space.
    assert fast == {
        "apart": 26,
        "overlapping": 24,
        "one in the other": 24,
        "white space": 8,
        "leading white space": 8,
        "equal after NFC": 26,
        "words": 24,
    }


def test_twin_without_the_conditions_some_combinations_differ(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fast_encoder, "list_conditions_not_met", lambda definition, reference: [])
    monkeypatch.setattr(fast_encoder, "list_checked_texts_of", lambda reference, definition: [])
    added = [name_token(0, "  ", normalized=True), name_token(1, "<b>", rstrip=True)]
    reference = write(tmp_path, define(added))
    choice = select_encoder(reference)
    assert choice.definition is not None
    assert "x<b>   y" in find_differing(choice.load(), reference, ["x<b>   y", "x  y"])


def test_twin_the_check_at_start_up_pairs_added_tokens_with_spaces(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fast_encoder, "list_conditions_not_met", lambda definition, reference: [])
    added = [name_token(0, "  ", normalized=True), name_token(1, "<b>", rstrip=True)]
    choice = select_encoder(write(tmp_path, define(added)))
    assert choice.definition is None
    assert "encoded otherwise by the fast encoder near" in choice.warning


def test_the_decision_is_the_tokenizers_alone(tmp_path):
    """The case of the report: its difference lay behind the sample of the corpus."""
    spaces = [name_token(n, " " * (4 - n), normalized=True) for n in range(3)]
    reference = write(tmp_path, define([*spaces, name_token(3, "<|end|>", rstrip=True, special=True)]))
    choice = select_encoder(reference)
    assert choice.load().encode("x<|end|>   y").tolist() == [ALPHABET.index("x"), 259, ALPHABET.index("y")]
    assert "contains white space" in choice.warning


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"normalizer": {"type": "NFKC"}}, "normaliser NFKC"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}}, "normaliser Replace"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
                        BYTE_LEVEL,
                    ],
                }
            },
            "rule that was not compared",
        ),
        ({"pre_tokenizer": None}, "no piece for"),
    ],
)
def test_other_structures_are_left_to_the_reference(tmp_path, parts, reason):
    choice = select_encoder(write(tmp_path, define([], **parts)))
    assert choice.definition is None
    assert reason in choice.warning


@pytest.mark.parametrize(
    "setting", [{"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "_"}]
)
def test_models_that_merge_otherwise_are_left_to_the_reference(setting):
    definition = define([])
    definition["model"] |= setting
    assert any(
        next(iter(setting)) in reason
        for reason in list_conditions_not_met(definition, tokenizers.Tokenizer(tokenizers.models.BPE()))
    )


def test_an_id_that_the_reference_does_not_give_is_noticed(tmp_path, capfd):
    """`tokenizers` gives the next free id, whatever the file says."""
    choice = select_encoder(write(tmp_path, define([name_token(7, "<a>")])))
    assert choice.definition is None
    assert "an id that the reference does not give it" in choice.warning


# --- rules of splitting ---------------------------------------------------------------------------------------------


def split_by(*rules: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False} for rule in rules]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL | {"use_regex": False}]}


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
RULES = {
    "ByteLevel": BYTE_LEVEL,
    "ByteLevel, prefix": BYTE_LEVEL | {"add_prefix_space": True},
    "digits": DIGITS,
    "Llama 3": split_by(LLAMA3_RULE),
    "Qwen 2": split_by(QWEN2_RULE),
    "GPT-4o": split_by(GPT4O_RULE),
    "DeepSeek": split_by(*DEEPSEEK_RULES),
}


def define_pairs(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Every two bytes merge, so that a cut between them shows in the ids."""
    letters = [char for char in ALPHABET if ord(char) < 0x100]
    pairs = [*itertools.product(letters[::3], letters[::2]), *itertools.product(ALPHABET[-40:], ALPHABET[-40:])]
    vocabulary = ALPHABET + sorted({left + right for left, right in pairs})
    model = {"type": "BPE", "unk_token": None, "vocab": {text: n for n, text in enumerate(vocabulary)}}
    return define([], pre_tokenizer=pre_tokenizer, normalizer={"type": "NFC"}, model=model | {"merges": pairs})


@pytest.mark.parametrize("name", RULES)
def test_rules_of_splitting_agree_on_characters_of_every_kind(tmp_path, name):
    reference = write(tmp_path, define_pairs(RULES[name]))
    choice = select_encoder(reference)
    assert choice.definition is not None, choice.warning
    code_points = [*range(1, 0x500), *range(0x500, 0x32400, 29), *range(0xE0000, 0xE0200, 13)]
    chars = [chr(code_point) for code_point in code_points if not 0xD800 <= code_point < 0xE000]
    texts = [
        "".join(f"a{char}b {char} 1{char}A'{char}!{char}{char}\n" for char in part)
        for part in itertools.batched(chars, 64)
    ]
    texts += [(ROOT / "README_zh-CN.md").read_text(encoding="utf-8"), "I'LL we'\u017f don't 'Tis 12345 \r\n\n x" * 50]
    texts += ["a'\u017fs 'S\u017f", "\u4f60'\u017fa", "e'\u017f\u0301"]
    ids, lengths = choice.load().encode_batch(texts)
    for text, got in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert np.array_equal(got, reference.encode(text)), text[:200]
