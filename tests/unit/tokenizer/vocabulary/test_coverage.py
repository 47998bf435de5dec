"""A character is covered if one token stands for exactly this character, in every kind of vocabulary."""

import json

import pytest
import tokenizers

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.vocabulary.coverage import list_character_tokens, measure_coverage, read_character_levels
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer


def test_sentencepiece_counts_pieces_and_not_bytes(tmp_path):
    encoder = load_encoder(train_toy_tokenizer(tmp_path))
    levels = {"known": tuple("春眠不"), "mixed": tuple("春龘鸟🦀 ")}
    known, mixed = measure_coverage(encoder, levels)
    assert (known.num_characters, known.num_covered, known.covered_ratio) == (3, 3, 1.0)
    assert (mixed.num_characters, mixed.num_covered) == (5, 3)


def test_byte_level_vocabularies_are_decoded(tmp_path):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TOY_TEXTS * 50, vocab_size=600, show_progress=False)
    tokenizer.add_tokens(["龘", "<tool>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_encoder(tmp_path)
    covered = list_character_tokens(encoder)
    assert {"a", " ", "，", "龘"} <= covered
    assert "é" not in covered
    for character in covered - {"龘"}:
        assert encoder.decode(encoder.encode(character)) == character


def test_other_hugging_face_vocabularies_are_read_as_they_are(tmp_path):
    vocabulary = {"<unk>": 0, "▁": 1, "字": 2, "字字": 3, "Ġ": 4}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("字", "字")])).save(
        str(tmp_path / "tokenizer.json")
    )
    assert list_character_tokens(load_encoder(tmp_path)) == {" ", "字", "Ġ"}


def test_levels_are_read_in_their_order(tmp_path):
    path = tmp_path / "levels.json"
    path.write_text(json.dumps({"b": {"texts": ["一", "丁", "一"], "color": "red"}, "a": ["丂"]}))
    assert read_character_levels(path) == {"b": ("一", "丁"), "a": ("丂",)}
    assert list(read_character_levels(path)) == ["b", "a"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"levels.json: content must be JSON, got: "),
        ("[]", r"levels.json: content must be a table, got \[\]. Write it as"),
        ("{}", r"levels.json: character list must have levels, got none. Write it as"),
        ('{"a": {"texts": []}}', r"levels.json: a must hold single characters, got none. Write it as"),
        ('{"a": "一二"}', r"levels.json: a must be a list, got '一二'. Write it as"),
        ('{"a": {"color": "red"}, "b": ["一"]}', r"levels.json: a must be a list, got None"),
        ('{"a": ["一", 4]}', r"levels.json: a\[1\] must be a text, got 4"),
        ('{"a": ["一", "二三", ""]}', r"levels.json: a must hold single characters, got '二三' and 1 more such"),
    ],
)
def test_a_wrong_list_is_named(tmp_path, content, message):
    path = tmp_path / "levels.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_character_levels(path)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.json: file cannot be read \(No such file"):
        read_character_levels(tmp_path / "none.json")
