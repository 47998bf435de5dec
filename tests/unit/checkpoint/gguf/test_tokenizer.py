"""What is written about a tokenizer for llama.cpp, and which tokenizers are refused."""

import dataclasses
import json
import re

import pytest
import transformers

from megatron_hammer.checkpoint.gguf import tokenizer as gguf_tokenizer
from megatron_hammer.checkpoint.gguf.metadata import build_metadata, list_unwritten, require_end
from megatron_hammer.checkpoint.gguf.tokenizer import SPLITTING_STEPS, list_unsupported, read_vocabulary
from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.sentencepiece_model import PieceType, read_sentencepiece_model
from megatron_hammer.tokenizer.export.export_tokenizer import export_tokenizer
from tests.helpers import toy_model
from tests.helpers.gguf_models import VOCAB_SIZE, PlainTokenizer, make_toy_model, write_byte_level
from tests.helpers.messages import raises_problem
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_tokenizer import (
    LLAMA_ADDED_TOKENS,
    LLAMA_CHAT_TEMPLATE,
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
    assert vocabulary.chat_templates == {"default": LLAMA_CHAT_TEMPLATE}
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


@pytest.mark.parametrize("steps, name", SPLITTING_STEPS.items(), ids=SPLITTING_STEPS.values())
def test_a_byte_level_bpe_is_written_with_its_rule_and_merges(tmp_path, steps, name):
    write_byte_level(tmp_path, steps[-1], has_single_digits=len(steps) == 2)
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


@pytest.mark.parametrize("steps, name", SPLITTING_STEPS.items(), ids=SPLITTING_STEPS.values())
def test_a_piece_that_merging_does_not_give_is_refused_where_it_matters(tmp_path, steps, name):
    """By ignore_merges a word that is a piece is taken whole; llama.cpp does so by the rule of Llama 3 only."""
    write_byte_level(tmp_path, steps[-1], has_single_digits=len(steps) == 2)
    is_llama3 = name == "llama-bpe"
    for ignores in (True, False):
        change_steps(tmp_path, lambda content, ignores=ignores: content["model"].update(ignore_merges=ignores))
        read_vocabulary(tmp_path, vocab_size=320, config={})  # merging gives every piece
    change_steps(tmp_path, lambda content: content["model"]["vocab"].update(xyz=310))
    for ignores in (True, False):
        change_steps(tmp_path, lambda content, ignores=ignores: content["model"].update(ignore_merges=ignores))
        if ignores == is_llama3:
            assert read_vocabulary(tmp_path, vocab_size=320, config={}).tokens[310] == "xyz"
            continue
        with pytest.raises(ConversionError, match=rf"rule {name}, got ignore_merges={ignores} and the piece 'xyz'"):
            read_vocabulary(tmp_path, vocab_size=320, config={})


def test_another_rule_is_refused(tmp_path):
    write_byte_level(tmp_path, r"\p{L}+|\s")
    with pytest.raises(ConversionError, match=r"text must be split.*qwen2, smollm, got \{.*\\p\{L\}\+"):
        read_vocabulary(tmp_path, vocab_size=320, config={})


def change_steps(folder, change) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


GPT2_STEPS = next(steps for steps, name in SPLITTING_STEPS.items() if name == "gpt-2")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def test_the_expression_of_byte_level_itself_is_gpt2s(tmp_path):
    write_byte_level(tmp_path, *GPT2_STEPS)
    change_steps(tmp_path, lambda content: content.update(pre_tokenizer=BYTES))
    assert read_vocabulary(tmp_path, vocab_size=320, config={}).splitting_rule == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, BYTES]}
    change_steps(tmp_path, lambda content: content.update(pre_tokenizer=steps))  # SmolLM2
    assert read_vocabulary(tmp_path, vocab_size=320, config={}).splitting_rule == "smollm"


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Digits", "individual_digits": False},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "WhitespaceSplit"},
        {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False},
    ],
    ids=lambda step: step["type"],
)
def test_a_step_that_no_rule_has_is_refused(tmp_path, step):
    """Before, a step of another type was passed over, and the rest taken for the whole rule."""
    write_byte_level(tmp_path, *GPT2_STEPS)
    change_steps(tmp_path, lambda content: content["pre_tokenizer"]["pretokenizers"].insert(0, step))
    with pytest.raises(ConversionError, match=f"text must be split by the rule of .*smollm, got .*{step['type']}"):
        read_vocabulary(tmp_path, vocab_size=320, config={})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalizer": {"type": "Lowercase"}}, "left as it is or composed .* got Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "got NFKC"),
        ({"behavior": "MergedWithPrevious"}, "text must be split by the rule of"),
        ({"end_of_word_suffix": "</w>"}, "know no marks of words .*'</w>'"),
    ],
    ids=["normalizer", "normalizers", "behavior", "suffix"],
)
def test_what_llama_cpp_does_not_do_is_refused(tmp_path, change, message):
    write_byte_level(tmp_path, *GPT2_STEPS)

    def apply(content):
        content.update({name: value for name, value in change.items() if name == "normalizer"})
        content["model"].update({name: value for name, value in change.items() if name == "end_of_word_suffix"})
        split = content["pre_tokenizer"]["pretokenizers"][0]
        split.update({name: value for name, value in change.items() if name == "behavior"})

    change_steps(tmp_path, apply)
    with pytest.raises(ConversionError, match=message):
        read_vocabulary(tmp_path, vocab_size=320, config={})


def test_every_end_of_a_text_is_kept_the_tokenizers_own_first(tmp_path):
    write_byte_level(tmp_path, *GPT2_STEPS)
    generation = {"eos_token_id": [7, 9, 300, 5]}
    vocabulary = read_vocabulary(tmp_path, vocab_size=320, config={"eos_token_id": 9}, generation=generation)
    assert vocabulary.eos_ids == (300, 7, 9, 5)
    writer = build_metadata(toy_model.LLAMA, vocabulary, arch="llama", file_type="f16", name="toy")
    values = writer.kv_data[0]
    ends = [values[f"tokenizer.ggml.{name}_token_id"].value for name in ("eos", "eot", "eom")]
    assert ends == [300, 7, 9]
    assert list_unwritten(vocabulary)[1:] == [
        f"1 of 4 ends of a text left out, GGUF names three: 5 ({vocabulary.tokens[5]})"
    ]
    assert read_vocabulary(tmp_path, vocab_size=320, config={"eos_token_id": [9, 7]}).eos_ids == (9, 7)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({}, {"eos_token_id": [7, 320]}, "eos_token_id: must be ids of the model's 320 tokens, got 320"),
        ({"eos_token_id": "7"}, None, "eos_token_id: must be ids of the model's 320 tokens, got '7'"),
        ({"bos_token_id": 999}, {}, "bos_token_id: must be ids of the model's 320 tokens, got 999"),
    ],
)
def test_ends_that_are_no_tokens_are_refused(tmp_path, config, generation, message):
    write_byte_level(tmp_path, *GPT2_STEPS)
    with pytest.raises(ConversionError, match=re.escape(message)):
        read_vocabulary(tmp_path, vocab_size=320, config=config, generation=generation)
    read_vocabulary(tmp_path, vocab_size=320, config={"eos_token_id": -1, "bos_token_id": None}, generation={})


def test_a_tokenizer_without_ends_is_refused_since_llama_cpp_would_take_an_ordinary_token(tmp_path):
    write_byte_level(tmp_path, *GPT2_STEPS)
    vocabulary = dataclasses.replace(read_vocabulary(tmp_path, vocab_size=320, config={}), eos_ids=())
    with pytest.raises(
        ConversionError, match=rf"eos_token_id: must .* takes 11 \({re.escape(vocabulary.tokens[11])}\)"
    ):
        require_end(vocabulary)
    (note,) = list_unwritten(vocabulary)
    assert "asks for bos_token gets 11 " in note
    vocabulary = dataclasses.replace(vocabulary, bos_id=5, eos_ids=(5,))
    require_end(vocabulary)
    assert list_unwritten(vocabulary) == []


def test_every_chat_template_is_kept_under_its_name(tmp_path, monkeypatch):
    write_byte_level(tmp_path, *GPT2_STEPS)
    templates = {"default": "{{ a }}", "tool_use": "{{ b }}"}
    monkeypatch.setattr(PlainTokenizer, "chat_template", templates)
    monkeypatch.setattr(gguf_tokenizer, "load_with_transformers", lambda folder: PlainTokenizer())
    vocabulary = read_vocabulary(tmp_path, vocab_size=320, config={})
    values = build_metadata(toy_model.LLAMA, vocabulary, arch="llama", file_type="f16", name="toy").kv_data[0]
    assert values["tokenizer.chat_template"].value == "{{ a }}"
    assert values["tokenizer.chat_template.tool_use"].value == "{{ b }}"
    assert values["tokenizer.chat_templates"].value == ["tool_use"]
