"""What is written about a tokenizer for llama.cpp, and which tokenizers are refused."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hammer.checkpoint.gguf import tokenizer as gguf_tokenizer
from megatron_hammer.checkpoint.gguf.tokenizer import SPLITTING_RULES, list_unsupported, read_vocabulary
from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType, read_sentencepiece_model
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers.gguf_models import VOCAB_SIZE, PlainTokenizer, make_toy_model
from tests.helpers.messages import raises_problem
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import (
    LLAMA_ADDED_TOKENS,
    LLAMA_CHAT_TEMPLATE,
    TOY_TEXTS,
    TOY_VOCAB_SIZE,
    write_llama_folder,
)

CONFIG = {"eos_token_id": [2, 7], "bos_token_id": None}


@pytest.fixture
def folder(tmp_path):
    export_tokenizer(make_toy_model(), tmp_path, max_length=None)
    return tmp_path


def test_a_sentencepiece_model_keeps_its_pieces_scores_and_types(folder):
    vocabulary = read_vocabulary(folder, vocab_size=VOCAB_SIZE, config=CONFIG)
    pieces = read_sentencepiece_model(folder / "tokenizer.model").pieces
    assert (vocabulary.model, vocabulary.splitting_rule, vocabulary.merges) == ("llama", "default", None)
    assert vocabulary.tokens[:TOY_VOCAB_SIZE] == tuple(piece.text for piece in pieces)
    assert vocabulary.scores[:TOY_VOCAB_SIZE] == tuple(piece.score for piece in pieces)
    assert vocabulary.types[:TOY_VOCAB_SIZE] == tuple(piece.type for piece in pieces)
    assert vocabulary.tokens[TOY_VOCAB_SIZE:] == tuple(f"[PAD{row}]" for row in range(TOY_VOCAB_SIZE, VOCAB_SIZE))
    assert set(vocabulary.types[TOY_VOCAB_SIZE:]) == {PieceType.UNUSED}
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unknown_id) == (1, 2, 0)
    assert (vocabulary.adds_bos, vocabulary.adds_eos, vocabulary.adds_space_prefix) == (False, False, False)
    assert not vocabulary.reads_control_tokens


def test_a_folder_without_tokenizer_json_keeps_what_lies_beside_the_model(tmp_path):
    model_path = train_model(tmp_path / "tokenizer.model", **MODEL_OPTIONS["dummy prefix"])
    num_pieces = len(read_sentencepiece_model(model_path).pieces)
    folder = write_llama_folder(tmp_path / "llama", model_path, num_pieces)
    vocabulary = read_vocabulary(folder, vocab_size=num_pieces + 7, config={})
    assert vocabulary.tokens[num_pieces:] == (*LLAMA_ADDED_TOKENS, *(f"[PAD{num_pieces + n}]" for n in (4, 5, 6)))
    kinds = [PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.CONTROL, PieceType.USER_DEFINED]
    assert list(vocabulary.types[num_pieces : num_pieces + 4]) == kinds
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.padding_id) == (1, num_pieces + 2, num_pieces)
    assert (vocabulary.adds_bos, vocabulary.adds_eos, vocabulary.adds_space_prefix) == (True, False, True)
    assert vocabulary.chat_template == LLAMA_CHAT_TEMPLATE
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the<|im_end|> fox <tool>x"
    assert vocabulary.encoder.encode(text).tolist() == oracle(text, add_special_tokens=False)["input_ids"]


def test_symbols_are_written_with_plain_spaces(tmp_path, monkeypatch):
    train_model(tmp_path / "tokenizer.model", **MODEL_OPTIONS["symbols of whitespace"])
    monkeypatch.setattr(gguf_tokenizer, "load_with_transformers", lambda folder: PlainTokenizer())
    vocabulary = read_vocabulary(tmp_path, vocab_size=400, config={})
    symbols = [
        text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind is PieceType.USER_DEFINED
    ]
    assert symbols == ["  ", " fox"]


@pytest.mark.parametrize(
    "options, reasons",
    [
        ("plain", []),
        ("dummy prefix", []),
        ("no byte fallback", ["byte_fallback=false: it writes unknown characters as bytes"]),
        ("normalised", ["a normaliser that rewrites characters: it has none"]),
        ("extra whitespace removed", ["remove_extra_whitespaces=true: it keeps every space"]),
        ("unigram", ["model_type=unigram: it merges by score, as BPE does"]),
    ],
)
def test_settings_that_llama_cpp_lacks_are_refused(tmp_path, options, reasons):
    path = train_model(tmp_path / "tokenizer.model", **MODEL_OPTIONS[options])
    assert list_unsupported(read_sentencepiece_model(path)) == reasons
    if reasons:
        with raises_problem(ConversionError, f"{path}: llama.cpp", f"got {reasons[0]}.", "transformers or vLLM"):
            read_vocabulary(tmp_path, vocab_size=400, config={})


def test_more_ids_than_rows_are_refused(folder):
    with pytest.raises(ConversionError, match=r"tokenizer must not have.*got 347 ids, vocab_size=300\b"):
        read_vocabulary(folder, vocab_size=300, config=CONFIG)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        ConversionError, match=r"must hold tokenizer\.model or tokenizer\.json, got neither.*--tokenizer-model\b"
    ):
        read_vocabulary(tmp_path, vocab_size=300, config=CONFIG)


def write_byte_level(folder, rule: str, **changes) -> None:
    """A byte-level BPE of a few merges that splits by `rule`, as Qwen2's does."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(TOY_TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    content = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("rule, name", SPLITTING_RULES.items(), ids=SPLITTING_RULES.values())
def test_a_byte_level_bpe_is_written_with_its_rule_and_merges(tmp_path, rule, name):
    write_byte_level(tmp_path, rule)
    vocabulary = read_vocabulary(tmp_path, vocab_size=320, config={})
    assert (vocabulary.model, vocabulary.splitting_rule) == ("gpt2", name)
    assert vocabulary.scores is None
    assert len(vocabulary.merges) == 300 - 256
    assert all(len(merge.split(" ")) == 2 for merge in vocabulary.merges)
    assert vocabulary.tokens[300] == "<|endoftext|>"
    assert vocabulary.types[300] is PieceType.CONTROL
    assert vocabulary.types[5] is PieceType.NORMAL
    assert vocabulary.eos_id == 300
    assert vocabulary.reads_control_tokens


def test_another_rule_is_refused(tmp_path):
    write_byte_level(tmp_path, r"\p{L}+|\s")
    with pytest.raises(ConversionError, match=r"text must be split.*qwen2, got \{.*\\p\{L\}\+"):
        read_vocabulary(tmp_path, vocab_size=320, config={})
