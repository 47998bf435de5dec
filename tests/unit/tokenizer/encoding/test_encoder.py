"""The encoder returns the ids of the library that defines each format."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_hammer.corpus.readers import read_documents
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import hash_tokenizer, load_encoder, require_eod_id
from megatron_hammer.tokenizer.encoding.fast_encoder import select_encoder
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer

HOSTILE_TEXTS = (
    "",
    " ",
    "a\x00b",
    "literal <s> and </s>",
    "x" * 5000,
    "😀 emoji 👩‍👩‍👧",
    "\ttab\n\n  two  spaces ",
    "７8９0",
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=313,
        special_tokens=["<|start|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOY_TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<|start|>"}, "eos_token": "<|stop|>", "auto_map": {"x": "evil.Tokenizer"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_sentencepiece_ids_are_the_reference_ids(model_path: Path) -> None:
    encoder = load_encoder(model_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    for text in (*TOY_TEXTS, *HOSTILE_TEXTS):
        ids = encoder.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text)
        assert encoder.decode(ids) == text


def test_sentencepiece_facts(model_path: Path) -> None:
    encoder = load_encoder(str(model_path))
    assert (encoder.vocab_size, encoder.bos_id, encoder.eod_id) == (TOY_VOCAB_SIZE, 1, 2)
    assert encoder.sha256 == hash_tokenizer(model_path) == hashlib.sha256(model_path.read_bytes()).hexdigest()
    assert encoder.path == model_path
    with pytest.raises(IndexError):
        encoder.decode([TOY_VOCAB_SIZE])


def test_hf_folder_encodes_without_special_tokens_and_round_trips(hf_folder: Path) -> None:
    encoder = load_encoder(hf_folder)
    assert (encoder.vocab_size, encoder.bos_id, encoder.eod_id) == (313, 0, 1)
    for text in (*TOY_TEXTS, *HOSTILE_TEXTS):
        assert encoder.decode(encoder.encode(text)) == text
    assert encoder.encode("the<|stop|>").tolist()[-1] == 1
    with pytest.raises(IndexError, match=r"outside the vocabulary of 313\b"):
        encoder.decode([313])


def test_hf_folder_agrees_with_transformers(hf_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(hf_folder / "tokenizer.json"))
    encoder = load_encoder(hf_folder / "tokenizer.json")
    for text in (*TOY_TEXTS, *HOSTILE_TEXTS):
        assert encoder.encode(text).tolist() == reference.encode(text, add_special_tokens=False)


def test_hf_folder_may_take_special_tokens_in_text_for_text(hf_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(hf_folder, tmp_path / "hf")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, "eos_token": "<|stop|>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder, as_before = load_encoder(tmp_path / "hf"), load_encoder(hf_folder)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the<|stop|>"
    assert encoder.encode(text).tolist() == reference.encode(text, add_special_tokens=False)
    assert encoder.encode(text).tolist() != as_before.encode(text).tolist()
    assert encoder.sha256 != as_before.sha256
    assert hash_tokenizer(tmp_path / "hf") == hash_tokenizer(tmp_path / "hf" / "tokenizer.json") == encoder.sha256
    assert hash_tokenizer(hf_folder) == as_before.sha256
    choice = select_encoder(load_encoder(tmp_path / "hf"))
    assert choice.warning is None
    assert choice.load().encode(text).tolist() == encoder.encode(text).tolist()


def test_folder_with_a_sentencepiece_model(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_path.read_bytes())
    assert load_encoder(tmp_path).vocab_size == TOY_VOCAB_SIZE


def test_a_tokenizer_without_end_of_document_is_refused_only_when_one_is_needed(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    encoder = load_encoder(tmp_path)
    assert encoder.eod_id is None
    with pytest.raises(DataError, match=r"tokenizer must have an end-of-document.*got none"):
        require_eod_id(encoder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.model", None, "{path}: tokenizer does not exist. Pass a SentencePiece .model, a tokenizer.json, or"),
        ("empty.model", b"", "{path}: file must be a SentencePiece model, got something else. Pass a .model file"),
        ("text.model", b"not a model", "{path}: file must be a SentencePiece model, got something else."),
        ("tokenizer.json", b"{}", "{path}: file must be a Hugging Face tokenizer.json, got one that does not parse"),
    ],
)
def test_a_path_that_is_not_a_tokenizer_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message.format(path=path))):
        load_encoder(path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder must hold tokenizer.json or tokenizer.model, got neither"):
        load_encoder(tmp_path)


def test_broken_tokenizer_config_is_named(hf_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: content must be JSON, got"):
        load_encoder(tmp_path)


@needs_shared_data
def test_published_tokenizer_on_real_text() -> None:
    encoder = load_encoder(SHARED_DATA / "tokenizer" / "hammerllm.model")
    assert (encoder.vocab_size, encoder.bos_id, encoder.eod_id) == (105_789, 1, 2)
    for _, document in zip(range(50), read_documents([SHARED_DATA / "corpus" / "zh.jsonl"]), strict=False):
        assert encoder.decode(encoder.encode(document.text)) == document.text


def test_added_tokens_that_are_one_text_when_normalised_are_refused(tmp_path):
    """The library finds either of them: of 40 loadings of this file, both are found in some."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in ("<Tool>", "<tool>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"must differ once they are normalised, got '<Tool>' and '<tool>'"):
        load_encoder(tmp_path)
    apart = (tmp_path / "tokenizer.json").read_text().replace('"normalized": true', '"normalized": false', 1)
    (tmp_path / "tokenizer.json").write_text(apart)
    assert load_encoder(tmp_path).encode("<Tool><tool>").tolist() == [1, 2]
