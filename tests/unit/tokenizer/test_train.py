"""HammerLLM's parameters reach the model, samples are uniform, the same input gives the same bytes."""

import re
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from toy_tokenizer import TOY_TEXTS, write_jsonl

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoder import load_encoder
from megatron_hammer.tokenizer.train import (
    TokenizerRecipe,
    cut_line,
    read_required_chars,
    read_user_defined_symbols,
    sample_lines,
    train_tokenizer,
)


@pytest.fixture
def corpus_path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TOY_TEXTS * 7)


def test_the_model_stores_hammerllms_parameters(corpus_path: Path, tmp_path: Path) -> None:
    trained = train_tokenizer([corpus_path], tmp_path / "new" / "t.model", TokenizerRecipe(vocab_size=331))
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
        train_tokenizer([corpus_path], tmp_path / name, recipe, max_bytes=900, seed=seed).path.read_bytes()
        for name, seed in (("a.model", 5), ("b.model", 5), ("c.model", 6))
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_counts_describe_text_and_sample(corpus_path: Path, tmp_path: Path) -> None:
    trained = train_tokenizer([corpus_path], tmp_path / "t.model", TokenizerRecipe(vocab_size=323), max_bytes=1000)
    assert trained.num_documents == 21
    assert trained.text_bytes == 7 * sum(len(text.encode()) for text in TOY_TEXTS)
    assert 900 < trained.sampled_bytes <= 1000


def test_required_characters_and_symbols_become_pieces(corpus_path: Path, tmp_path: Path) -> None:
    (tmp_path / "chars.txt").write_text("龘\n靐\n龘\n", encoding="utf-8")
    (tmp_path / "symbols.txt").write_text('<SEP>\n<a,b>\n\n"q"\n<SEP>\n', encoding="utf-8")
    chars = read_required_chars(tmp_path / "chars.txt")
    symbols = read_user_defined_symbols(tmp_path / "symbols.txt")
    assert (chars, symbols) == ("龘靐", ("<SEP>", "<a,b>", '"q"'))
    recipe = TokenizerRecipe(vocab_size=341, required_chars=chars, user_defined_symbols=symbols)
    encoder = load_encoder(train_tokenizer([corpus_path], tmp_path / "t.model", recipe).path)
    for piece in (*chars, *symbols):
        assert len(encoder.encode(piece)) == 1


def test_sample_keeps_order_and_limit() -> None:
    lines = [b"%04d" % number for number in range(1000)]
    sample = sample_lines(lines, max_bytes=402, seed=3)
    assert len(sample) == 100
    assert sample == sorted(sample)
    assert sample == sample_lines(iter(lines), max_bytes=402, seed=3)
    assert sample != sample_lines(lines, max_bytes=402, seed=4)
    assert 300 < sum(int(line) for line in sample) / len(sample) < 700  # not the head, not the tail
    assert sample_lines(lines, max_bytes=None, seed=3) == lines


@pytest.mark.parametrize("line", [b"", b"short", b"some words " * 30, "汉字没有空格".encode() * 20, b"x" * 200])
def test_cut_lines_are_whole_characters_and_lose_nothing(line: bytes) -> None:
    pieces = list(cut_line(line, 64))
    assert b"".join(pieces) == line
    assert all(len(piece) <= 64 and piece.decode("utf-8") is not None for piece in pieces)


def test_problems_are_named(corpus_path: Path, tmp_path: Path) -> None:
    output_path = tmp_path / "t.model"

    def expect(message: str, vocab_size: int = 331, path: Path = corpus_path) -> None:
        with pytest.raises(DataError, match=message):
            train_tokenizer([path], output_path, TokenizerRecipe(vocab_size=vocab_size))

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
    empty_path = write_jsonl(tmp_path / "empty.jsonl", ["", " \n "])
    expect(re.escape(f"{empty_path}: inputs must hold text, got none in 2 documents. Add some."), path=empty_path)
    expect("absent.jsonl: input file does not exist. Check the path.", path=tmp_path / "absent.jsonl")
    assert not list(tmp_path.glob("t.model*"))


def test_unreadable_word_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt: file cannot be read \(No such file or directory\)"):
        read_required_chars(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    with pytest.raises(DataError, match=r"latin.txt: text must be UTF-8, got byte 0xe9 at offset 2. Convert the file"):
        read_user_defined_symbols(tmp_path / "latin.txt")
