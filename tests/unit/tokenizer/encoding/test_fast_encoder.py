"""The fast encoder is chosen only where it is exact, and what makes it inexact is noticed at start-up."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_hammer.tokenizer.encoding import fast_encoder
from megatron_hammer.tokenizer.encoding.encoder import HuggingFaceEncoder, SentencePieceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.fast_encoder import (
    FastEncoder,
    PartwiseEncoder,
    find_difference,
    select_encoder,
)
from megatron_hammer.tokenizer.encoding.hugging_face_tokenizer import define_plain_tokenizer
from megatron_hammer.tokenizer.encoding.sentencepiece_model import read_sentencepiece_model
from tests.helpers.hostile_text import build_hostile_texts
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import TOY_TEXTS


@pytest.fixture(scope="module")
def symbols_path(tmp_path_factory) -> Path:
    return train_model(tmp_path_factory.mktemp("models") / "symbols.model", **MODEL_OPTIONS["symbols"])


def hostile_texts(path: Path, num_texts: int = 1500) -> list[str]:
    pieces = [piece.text.replace("▁", " ") for piece in read_sentencepiece_model(path).pieces]
    return build_hostile_texts(pieces, num_texts=num_texts, seed=11)


def assert_same_ids(encoder, reference, texts):
    ids, lengths = encoder.encode_batch(texts)
    expected = [reference.encode(text) for text in texts]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == [len(part) for part in expected]
    assert np.array_equal(ids, np.concatenate(expected))


@pytest.mark.parametrize("kind", ["native", "fastokens"])
@pytest.mark.parametrize("name", ["plain", "dummy prefix", "no byte fallback", "symbols", "symbols and prefix"])
def test_the_fast_encoder_is_chosen_and_exact(tmp_path, name, kind):
    path = train_model(tmp_path / "a.model", **MODEL_OPTIONS[name])
    kinds = (kind, "fastokens")
    choice = pickle.loads(pickle.dumps(select_encoder(load_encoder(path), kinds)))
    assert choice.warning is None
    is_native = kind == "native" and name != "no byte fallback"
    assert (choice.tables is not None, choice.definition is not None) == (is_native, not is_native)
    assert_same_ids(choice.load(), load_encoder(path), hostile_texts(path))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("unigram", "cannot be expressed for the fast encoder (model_type=unigram: only BPE merges are mapped)"),
        ("normalised", "cannot be expressed for the fast encoder (its normaliser rewrites text: fast encoders know no"),
        ("extra whitespace removed", "cannot be expressed for the fast encoder (its normaliser rewrites text: "),
        (
            "symbols and extra whitespace removed",
            "cannot be expressed for the fast encoder (remove_extra_whitespaces with user-defined symbols: spaces",
        ),
        ("symbols of whitespace", "cannot be expressed for the fast encoder (user-defined symbols with white space: "),
    ],
)
def test_other_models_are_left_to_the_reference_with_a_warning(tmp_path, name, reason):
    path = train_model(tmp_path / "a.model", **MODEL_OPTIONS[name])
    choice = select_encoder(load_encoder(path))
    assert choice.warning is not None
    assert choice.warning.startswith(f"{path}: tokenizer {reason}")
    assert choice.warning.endswith(". The reference encodes instead, exactly but slower.")
    assert_same_ids(choice.load(), load_encoder(path), hostile_texts(path, 200))


def test_facts_and_decoding_are_the_references(symbols_path):
    encoder, reference = select_encoder(load_encoder(symbols_path)).load(), load_encoder(symbols_path)
    for name in ("path", "sha256", "vocab_size", "bos_id", "eod_id"):
        assert getattr(encoder, name) == getattr(reference, name)
    assert encoder.decode(encoder.encode("the 花落 dog")) == "the 花落 dog"
    assert encoder.encode("").tolist() == []
    ids, lengths = encoder.encode_batch([])
    assert (len(ids), len(lengths)) == (0, 0)


def test_long_texts_go_in_parts_and_keep_their_place(symbols_path):
    reference = load_encoder(symbols_path)
    choice = select_encoder(load_encoder(symbols_path), kinds=("fastokens",))
    assert choice.cutter is not None
    texts = ["", "x" * 3000, *TOY_TEXTS, "", TOY_TEXTS[2] * 50]
    assert_same_ids(PartwiseEncoder(reference, choice.cutter, max_part_chars=40), reference, texts)
    fast = FastEncoder(reference, choice.definition, prefix=choice.prefix)
    assert_same_ids(PartwiseEncoder(fast, choice.cutter, max_part_chars=40), reference, texts)


# --- wrong encoders -------------------------------------------------------------------------------------------------


def leave_control_tokens_special(definition):
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for name in ("<s>", "</s>"):
        token_id = definition["model"]["vocab"].pop(f" {name}")
        definition["model"]["vocab"][name] = token_id
        definition["added_tokens"].append({"id": token_id, "content": name, **special})


def drop_the_last_merge(definition):
    definition["model"]["merges"].pop()


def drop_a_symbol(definition):
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != "th"]


@pytest.mark.parametrize("damage", [leave_control_tokens_special, drop_the_last_merge, drop_a_symbol])
def test_twin_a_wrong_encoder_is_noticed_at_start_up(symbols_path, monkeypatch, damage):
    def define_wrongly(model):
        definition = json.loads(define_plain_tokenizer(model))
        damage(definition)
        return json.dumps(definition).encode()

    monkeypatch.setattr(fast_encoder, "define_plain_tokenizer", define_wrongly)
    choice = select_encoder(load_encoder(symbols_path), kinds=("fastokens",))
    assert choice.definition is None
    assert choice.warning is not None
    assert "is encoded otherwise by the fast encoder near" in choice.warning
    assert isinstance(choice.load().encode("<s>"), np.ndarray)
    reference = SentencePieceEncoder(symbols_path)
    assert_same_ids(choice.load(), reference, hostile_texts(symbols_path, 100))


def test_twin_an_encoder_that_is_wrong_only_on_the_corpus_is_noticed(symbols_path):
    reference = load_encoder(symbols_path)

    class WrongOnOneWord(FastEncoder):
        def encode(self, text):
            return super().encode(text.replace("zebra", "horse"))

    wrong = WrongOnOneWord(reference, select_encoder(load_encoder(symbols_path), kinds=("fastokens",)).definition)
    assert find_difference(wrong, reference, ["a horse"]) is None
    assert find_difference(wrong, reference, ["a horse", "a zebra"]) == (
        "is encoded otherwise by the fast encoder near 'a zebr'"
    )


# --- tokenizer.json -------------------------------------------------------------------------------------------------


def write_byte_level_tokenizer(folder: Path, **changes: Any) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=313,
        special_tokens=["<|start|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOY_TEXTS, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.mark.parametrize("splits_special_tokens", [False, True])
def test_a_byte_level_tokenizer_json_is_encoded_fast(tmp_path, splits_special_tokens):
    write_byte_level_tokenizer(tmp_path)
    config = {"split_special_tokens": splits_special_tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    choice = select_encoder(load_encoder(tmp_path))
    assert choice.warning is None
    assert choice.definition is not None
    reference = load_encoder(tmp_path)
    assert isinstance(reference, HuggingFaceEncoder)
    texts = build_hostile_texts(["<|start|>", "the", " fox", "花落"], num_texts=1500, seed=3)
    assert_same_ids(choice.load(), reference, texts)


def test_a_wrong_fast_encoder_of_a_tokenizer_json_is_noticed_at_start_up(tmp_path, monkeypatch):
    class WrongOnOneWord(FastEncoder):
        def encode(self, text):
            return super().encode(text.replace("world", "globe"))

    monkeypatch.setattr(fast_encoder, "FastEncoder", WrongOnOneWord)
    choice = select_encoder(load_encoder(write_byte_level_tokenizer(tmp_path)))
    assert choice.definition is None
    assert "is encoded otherwise by the fast encoder near" in choice.warning


def test_a_tokenizer_json_that_the_fast_encoder_does_not_know_is_left_to_the_reference(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    choice = select_encoder(load_encoder(tmp_path))
    assert "its model is WordLevel, not BPE" in choice.warning
    assert choice.load().encode("the").tolist() == [0]
