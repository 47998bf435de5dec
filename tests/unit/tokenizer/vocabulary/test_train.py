"""The recipe reaches the model, the same input gives the same bytes, and required characters become pieces."""

import _thread
import dataclasses
import re
import threading
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from megatron_hammer.tokenizer.vocabulary import train
from megatron_hammer.tokenizer.vocabulary.recipes import TokenizerRecipe
from megatron_hammer.tokenizer.vocabulary.text_sample import TextSource
from megatron_hammer.tokenizer.vocabulary.train import check_requirements, train_tokenizer
from tests.helpers.messages import assert_problems
from tests.helpers.toy_tokenizer import TOY_TEXTS, write_jsonl


@pytest.fixture
def corpus_path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TOY_TEXTS * 7)


def test_the_model_stores_hammerllms_parameters(corpus_path: Path, tmp_path: Path) -> None:
    trained = train_tokenizer(
        [TextSource(inputs=(corpus_path,))], tmp_path / "new" / "t.model", TokenizerRecipe(vocab_size=331)
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.path.read_bytes())
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    assert len(model.pieces) == trained.vocab_size == 331
    assert spec.model_type == spec.BPE
    assert spec.character_coverage == pytest.approx(0.9995)
    assert (spec.max_sentence_length, spec.max_sentencepiece_length) == (8384, 32)
    assert spec.byte_fallback
    assert spec.split_digits
    assert spec.allow_whitespace_only_pieces
    assert normalizer.name == "identity"
    assert not normalizer.add_dummy_prefix
    assert not normalizer.remove_extra_whitespaces
    assert not list(trained.path.parent.glob("*.partial"))


def test_same_text_and_seed_give_the_same_bytes(corpus_path: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe(vocab_size=319)
    contents = [
        train_tokenizer(
            [TextSource(inputs=(corpus_path,))], tmp_path / name, recipe, max_bytes=900, seed=seed
        ).path.read_bytes()
        for name, seed in (("a.model", 5), ("b.model", 5), ("c.model", 6))
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_number_of_threads_changes_nothing(corpus_path: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe(vocab_size=331)
    contents = {
        train_tokenizer(
            [TextSource(inputs=(corpus_path,))], tmp_path / "t.model", recipe, num_threads=num_threads
        ).path.read_bytes()
        for num_threads in (1, 2, 5)
    }
    assert len(contents) == 1
    assert sentencepiece_model_pb2.ModelProto.FromString(contents.pop()).trainer_spec.num_threads == 1


def test_counts_describe_text_and_sample(corpus_path: Path, tmp_path: Path) -> None:
    told: list[int] = []
    trained = train_tokenizer(
        [TextSource(inputs=(corpus_path,))],
        tmp_path / "t.model",
        TokenizerRecipe(vocab_size=323),
        max_bytes=1000,
        on_bytes_read=told.append,
        on_training=told.append,
    )
    assert trained.num_documents == 21
    assert trained.text_bytes == 7 * sum(len(text.encode()) for text in TOY_TEXTS)
    assert 900 < trained.sampled_bytes <= 1000
    assert sum(told[:-1]) == corpus_path.stat().st_size
    assert told[-1] == trained.sampled_bytes


def test_weighted_sources_shape_the_vocabulary(tmp_path: Path) -> None:
    english = TextSource(inputs=(write_jsonl(tmp_path / "en.jsonl", TOY_TEXTS[:1] * 90),), weight=1)
    chinese = write_jsonl(tmp_path / "zh.jsonl", TOY_TEXTS[2:] * 90)
    pieces = []
    for weight in (0.05, 20):
        sources = [english, TextSource(inputs=(chinese,), weight=weight)]
        recipe = TokenizerRecipe(vocab_size=315, character_coverage=1.0)
        trained = train_tokenizer(sources, tmp_path / "t.model", recipe, max_bytes=4000)
        assert [source.weight for source in trained.sources] == [1, weight]
        texts = [piece.text for piece in read_sentencepiece_model(trained.path).pieces]
        pieces.append(sum(len(text) > 1 and "\u4e00" <= text[0] <= "\u9fff" for text in texts))
    assert pieces[0] < pieces[1]


def test_required_characters_and_symbols_become_pieces(corpus_path: Path, tmp_path: Path) -> None:
    chars, symbols = "龘靐 <", ("<SEP>", "<a,b>", '"q"', "</p >", "靐", "<")
    recipe = TokenizerRecipe(vocab_size=347, required_chars=chars, user_defined_symbols=symbols)
    encoder = load_encoder(train_tokenizer([TextSource(inputs=(corpus_path,))], tmp_path / "t.model", recipe).path)
    for piece in (*chars, *symbols):
        assert len(encoder.encode(piece)) == 1


def test_characters_that_the_model_cannot_hold_are_named(corpus_path: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe(vocab_size=331, required_chars="龘\0", user_defined_symbols=("<s>", "<SEP>"))
    with pytest.raises(DataError) as raised:
        train_tokenizer([TextSource(inputs=(corpus_path,))], tmp_path / "t.model", recipe)
    assert_problems(
        raised.value.problems,
        ("required-chars-file:", "every character must become", "got none for '\\x00'"),
        ("user-defined-symbols-file:", "every symbol must become", "got none for '<s>'"),
    )
    assert not list(tmp_path.glob("t.model*"))


def test_twin_a_model_without_a_required_character_is_noticed(corpus_path: Path, tmp_path: Path) -> None:
    recipe = TokenizerRecipe(vocab_size=331, required_chars="龘靐")
    model = read_sentencepiece_model(
        train_tokenizer([TextSource(inputs=(corpus_path,))], tmp_path / "t.model", recipe).path
    )
    check_requirements(serialize_sentencepiece_model(model), recipe)
    fewer = dataclasses.replace(model, pieces=tuple(piece for piece in model.pieces if piece.text != "靐"))
    with pytest.raises(DataError, match="got none for '靐'"):
        check_requirements(serialize_sentencepiece_model(fewer), recipe)


def test_ctrl_c_does_not_wait_for_sentencepiece(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()

    def train_for_long(*arguments: object) -> bytes:
        _thread.interrupt_main()
        is_over.wait(60)
        return b""

    monkeypatch.setattr(train, "_train_sentencepiece", train_for_long)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([TextSource(inputs=(corpus_path,))], tmp_path / "t.model", TokenizerRecipe(vocab_size=331))
    assert not is_over.is_set()
    is_over.set()
    assert not list(tmp_path.glob("t.model*"))


def test_problems_are_named(corpus_path: Path, tmp_path: Path) -> None:
    output_path = tmp_path / "t.model"

    def expect(message: str, path: Path = corpus_path, **changes: object) -> None:
        with pytest.raises(DataError, match=message):
            train_tokenizer([TextSource(inputs=(path,))], output_path, TokenizerRecipe(**{"vocab_size": 331} | changes))

    expect(
        r"^vocab-size: must not exceed what the text can give, got vocab_size=50000, pieces found=\d+. "
        r"Use at most \d+, or train on more text.$",
        vocab_size=50_000,
    )
    expect(
        r"^vocab-size: must hold every byte, symbol and character, got vocab_size=270, needed=\d+. "
        r"Raise --vocab-size or lower --character-coverage.$",
        vocab_size=270,
    )
    expect(
        r"^tokenizer training: sentencepiece refused the text or the options .*already",
        user_defined_symbols=("<0x41>",),
    )
    empty_path = write_jsonl(tmp_path / "empty.jsonl", ["", " \n "])
    expect(re.escape(f"{empty_path}: inputs must hold text, got none in 2 documents. Add some."), path=empty_path)
    expect("absent.jsonl: input file does not exist. Check the path.", path=tmp_path / "absent.jsonl")
    assert not list(tmp_path.glob("t.model*"))
