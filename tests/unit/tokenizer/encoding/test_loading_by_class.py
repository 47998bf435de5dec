"""What AutoTokenizer makes of a tokenizer.json by the class beside it; the known classes are as the tables say."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_hammer.tokenizer.encoding.encoder import HuggingFaceEncoder, load_encoder
from megatron_hammer.tokenizer.encoding.loading_by_class import (
    QWEN_RULES,
    READ_AS_QWEN,
    READ_AS_WRITTEN,
    describe_other_loading,
    is_known_to_load_alike,
)
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import TOY_TEXTS

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
# GPT-2's rule and a step that no class has: what is not read as written differs.
ODD = {
    "normalizer": normalizers.Lowercase(),
    "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]),
}


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|endoftext|>"]
    tokenizer.train_from_iterator(
        TOY_TEXTS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return json.loads(tokenizer.to_str())


def write(
    folder: Path, definition: dict[str, Any], name: str | None, model_type: str | None = None, **config: Any
) -> HuggingFaceEncoder:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    config = NAMED | config if name is None else {"tokenizer_class": name} | NAMED | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    encoder = load_encoder(folder)
    assert isinstance(encoder, HuggingFaceEncoder)
    return encoder


@pytest.mark.parametrize(("name", "model_type"), sorted(READ_AS_WRITTEN, key=str))
def test_classes_that_read_the_file_as_it_is(tmp_path: Path, definition, name: str, model_type: str | None) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.normalizer, tokenizer.pre_tokenizer = ODD["normalizer"], ODD["pre_tokenizer"]
    encoder = write(tmp_path / "t", json.loads(tokenizer.to_str()), name, model_type)
    assert is_known_to_load_alike(encoder)
    assert describe_other_loading(encoder) is None


@pytest.mark.parametrize(("name", "model_type"), sorted(READ_AS_QWEN, key=str))
def test_classes_that_have_the_rules_of_qwen(tmp_path: Path, definition, name: str, model_type: str | None) -> None:
    rules = copy.deepcopy(QWEN_RULES)
    rules["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    encoder = write(tmp_path / "t", definition | rules, name, model_type)
    assert is_known_to_load_alike(encoder)
    assert describe_other_loading(encoder) is None
    other = copy.deepcopy(definition | rules)
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert not is_known_to_load_alike(write(tmp_path / "other", other, name, model_type))


@pytest.mark.parametrize(
    ("name", "model_type"), [("GPT2Tokenizer", None), ("PreTrainedTokenizerFast", "qwen2"), (None, "qwen3")]
)
def test_a_class_with_rules_of_its_own_is_told(tmp_path: Path, definition, name, model_type) -> None:
    encoder = write(tmp_path / "t", definition | {"normalizer": {"type": "Lowercase"}}, name, model_type)
    assert not is_known_to_load_alike(encoder)
    sentence = describe_other_loading(encoder)
    assert sentence is not None
    assert sentence.startswith(
        f"{tmp_path / 't'}: transformers' AutoTokenizer is another tokenizer than tokenizer.json"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"additional_special_tokens": ["the"]},
        {"pad_token": "the"},
        {"added_tokens_decoder": {"0": {"content": "<s>", "lstrip": True, "special": True}}},
    ],
)
def test_added_tokens_that_only_other_files_have_are_told(tmp_path: Path, definition, changes: dict[str, Any]) -> None:
    encoder = write(tmp_path / "t", definition, "PreTrainedTokenizerFast", **changes)
    assert not is_known_to_load_alike(encoder)
    assert describe_other_loading(encoder) is not None


def test_a_tokenizer_json_by_itself_and_a_sentencepiece_model_that_transformers_converts(tmp_path: Path, definition):
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert is_known_to_load_alike(HuggingFaceEncoder(tmp_path / "tokenizer.json"))
    (tmp_path / "model").mkdir()
    train_model(tmp_path / "model" / "tokenizer.model", **MODEL_OPTIONS["dummy prefix"])
    sentence = describe_other_loading(load_encoder(tmp_path / "model"))
    assert sentence is not None
    assert "another tokenizer than tokenizer.model" in sentence


def test_what_transformers_cannot_load_or_encode_is_no_other_tokenizer(tmp_path: Path, definition) -> None:
    encoder = write(tmp_path / "t", definition, "PreTrainedTokenizerFast", added_tokens_decoder={"0": 7})
    assert describe_other_loading(encoder) is None
    # Loaded, but its unknown token is not in the vocabulary, so that most texts are errors, which are no ids.
    sentence = describe_other_loading(write(tmp_path / "gemma", definition, "GemmaTokenizer"))
    assert sentence is not None
    assert "'<mask>' is [" in sentence
