"""Text that is encoded in parts has the ids of the whole text, for every kind of model that allows it."""

import numpy as np
import pytest

from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import read_sentencepiece_model
from megatron_hammer.tokenizer.encoding.text_cuts import TextCutter, build_text_cutter
from tests.helpers.hostile_text import build_hostile_texts
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model


def load(tmp_path, options):
    path = train_model(tmp_path / "a.model", **options)
    model = read_sentencepiece_model(path)
    pieces = [piece.text.replace("▁", " ") for piece in model.pieces]
    return load_encoder(path), build_text_cutter(model), build_hostile_texts(pieces, num_texts=1500, seed=7)


def encode_in_parts(encoder, parts):
    return np.concatenate([encoder.encode(part) for part in parts])


@pytest.mark.parametrize("name", ["plain", "dummy prefix", "no byte fallback", "symbols", "symbols and prefix"])
def test_parts_have_the_ids_of_the_whole(tmp_path, name):
    encoder, cutter, texts = load(tmp_path, MODEL_OPTIONS[name])
    num_cuts = 0
    for text in texts:
        parts = list(cutter.cut(text, max_part_chars=1))
        num_cuts += len(parts) - 1
        assert np.array_equal(encode_in_parts(encoder, parts), encoder.encode(text)), text
    assert num_cuts > 3 * len(texts) / 10


@pytest.mark.parametrize("name", ["normalised", "extra whitespace removed", "unigram"])
def test_models_whose_ids_depend_on_more_are_not_cut(tmp_path, name):
    assert load(tmp_path, MODEL_OPTIONS[name])[1] is None


def test_no_character_is_lost_and_parts_are_about_as_long_as_asked(tmp_path):
    _, cutter, _ = load(tmp_path, MODEL_OPTIONS["plain"])
    text = "the quick brown fox jumps over the lazy dog。\n" * 2000
    parts = list(cutter.cut(text, max_part_chars=5000))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 5000
    assert len(parts) == 19


def test_a_long_run_without_a_boundary_stays_whole_up_to_its_end(tmp_path):
    _, cutter, _ = load(tmp_path, MODEL_OPTIONS["plain"])
    run = "the" * 3000
    boundaries = cutter.find_boundaries("thethe")
    assert len(boundaries) == 0, "choose another run"
    assert list(cutter.cut(run, max_part_chars=10)) == [run]
    parts = list(cutter.cut(run + "é" + "x", max_part_chars=10))
    assert parts == [run, "éx"]


def test_twin_a_cutter_that_misses_some_pairs_changes_ids(tmp_path):
    encoder, cutter, texts = load(tmp_path, MODEL_OPTIONS["plain"])
    broken = TextCutter(cutter._inner_pairs[::2], has_dummy_prefix=False, known_chars=None)
    parts = (list(broken.cut(text, max_part_chars=1)) for text in texts)
    differing = [
        text
        for text, part in zip(texts, parts, strict=True)
        if not np.array_equal(encode_in_parts(encoder, part), encoder.encode(text))
    ]
    assert differing


def test_twin_two_unknown_characters_are_not_cut_apart(tmp_path):
    encoder, cutter, _ = load(tmp_path, MODEL_OPTIONS["no byte fallback"])
    broken = TextCutter(cutter._inner_pairs, has_dummy_prefix=False, known_chars=None)
    text = "the 龘龘 fox"
    assert np.array_equal(encode_in_parts(encoder, cutter.cut(text, 1)), encoder.encode(text))
    assert not np.array_equal(encode_in_parts(encoder, broken.cut(text, 1)), encoder.encode(text))
