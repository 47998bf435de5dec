"""The ids that begin and end a document are those that transformers' AutoTokenizer names, or there is an error."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding import special_tokens
from megatron_hammer.tokenizer.encoding.encoder import DeferredEncoder, load_encoder, require_eod_id

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer"}
ADDED = ("</s>", "<|im_end|>", "<|endoftext|>", "<s>")


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate("abc")}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(ADDED))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": FAST | {"eos_token": "<|im_end|>"}},
        {"tokenizer_config.json": FAST | {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}},
        {"tokenizer_config.json": FAST | {"eos_token": None, "bos_token": None}},
        {"tokenizer_config.json": FAST},
        {"tokenizer_config.json": FAST, "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": "<s>"}},
        {
            "tokenizer_config.json": FAST | {"eos_token": "</s>"},
            "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
        },
        {"tokenizer_config.json": FAST | {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": None}},
        {
            "tokenizer_config.json": FAST | {"eos_token": "</s>", "added_tokens_decoder": {}},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
        {"tokenizer_config.json": QWEN},
        {"tokenizer_config.json": QWEN | {"eos_token": None}},
        {"config.json": {"model_type": "qwen2"}},
        {"config.json": {"model_type": "qwen2"}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    ],
    ids=str,
)
def test_the_ids_are_those_of_auto_tokenizer(tmp_path, files):
    encoder = load_encoder(write_folder(tmp_path, files))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (encoder.eod_id, encoder.bos_id) == (oracle.eos_token_id, oracle.bos_token_id)
    # Workers get the answer with the encoder.
    sent = pickle.loads(pickle.dumps(DeferredEncoder(encoder)))
    assert sent.special_tokens.ids == {"eos_token": oracle.eos_token_id, "bos_token": oracle.bos_token_id}


def test_transformers_is_not_asked_where_the_files_say_it(tmp_path, monkeypatch):
    def refuse(folder: Path) -> None:
        raise AssertionError(f"{folder} was loaded")

    monkeypatch.setattr(special_tokens, "load_with_transformers", refuse)
    config = FAST | {"eos_token": "<|im_end|>", "bos_token": None}
    encoder = load_encoder(write_folder(tmp_path, {"tokenizer_config.json": config}))
    assert (encoder.bos_id, encoder.eod_id) == (None, 4)


def test_a_tokenizer_json_alone_names_no_end_of_document(tmp_path):
    """It holds </s> and <|endoftext|>; which of them ends a document would be a guess."""
    encoder = load_encoder(write_folder(tmp_path, {}))
    assert (encoder.bos_id, encoder.eod_id) == (None, None)
    with pytest.raises(
        DataError, match=r"tokenizer.json: tokenizer must have an end-of-document token, got none. Name"
    ):
        require_eod_id(encoder)


@pytest.mark.parametrize("value", [5, ["<|im_end|>"], {"content": None}, True])
def test_a_token_that_is_no_text_is_refused_when_it_is_needed(tmp_path, value):
    encoder = load_encoder(write_folder(tmp_path, {"tokenizer_config.json": FAST | {"eos_token": value}}))
    with pytest.raises(DataError, match=r"eos_token must be a text .*, got eos_token="):
        require_eod_id(encoder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_token_outside_the_vocabulary_is_refused_when_it_is_needed(tmp_path, name):
    files = {"tokenizer_config.json": FAST} | {name: FAST | {"eos_token": "<|new|>"}}
    encoder = load_encoder(write_folder(tmp_path, files))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert oracle.eos_token_id == encoder.vocab_size  # an id that the model has no row for
    with pytest.raises(DataError, match=r"eos_token must be in the vocabulary, got eos_token='<\|new\|>'"):
        require_eod_id(encoder)
    assert encoder.bos_id is None


def test_a_default_of_the_class_outside_the_vocabulary_is_refused(tmp_path):
    write_folder(tmp_path, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}})
    text = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"eos_token='<\|endoftext\|>', which is not"):
        require_eod_id(load_encoder(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, content):
    write_folder(tmp_path, {})
    (tmp_path / "special_tokens_map.json").write_text(content)
    with pytest.raises(DataError, match=r"special_tokens_map.json: content must be"):
        load_encoder(tmp_path)
