"""Counts are those of the encoder, however the documents are batched; a sample depends on the seed alone."""

from pathlib import Path

import pytest

from megatron_hammer.corpus import readers
from megatron_hammer.corpus.readers import Document
from megatron_hammer.errors import ConfigError
from megatron_hammer.tokenizer.analysis.analyze import (
    analyze_tokenizers,
    load_named_tokenizers,
    parse_named_tokenizer,
    sample_documents,
)
from megatron_hammer.tokenizer.analysis.script import Script
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer


@pytest.fixture
def encoder(tmp_path):
    return load_encoder(train_toy_tokenizer(tmp_path))


DOCUMENTS = [Document(text, "c.jsonl", line) for line, text in enumerate((*TOY_TEXTS, "", "мир"), start=1)]


@pytest.mark.parametrize("batch_chars", [1, 60, 10_000])
def test_counts_do_not_depend_on_the_batches(encoder, monkeypatch, batch_chars):
    monkeypatch.setattr(readers, "BATCH_CHARS", batch_chars)
    analysis = analyze_tokenizers({"a": encoder, "b": encoder}, iter(DOCUMENTS), reference="b")
    assert (analysis.num_documents, analysis.reference) == (5, "b")
    assert analysis.text_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    assert list(analysis.scripts) == [Script.HAN, Script.LATIN, Script.OTHER, Script.NONE]
    latin = analysis.scripts[Script.LATIN]
    assert (latin.num_documents, latin.num_units) == (2, sum(len(text.split()) for text in TOY_TEXTS[:2]))
    for tokenizer in analysis.tokenizers:
        assert tokenizer.num_tokens[Script.HAN] == len(encoder.encode(TOY_TEXTS[2]))
        assert tokenizer.num_tokens.total() == sum(len(encoder.encode(document.text)) for document in DOCUMENTS)
        assert (tokenizer.round_trip.num_documents, tokenizer.round_trip.num_changed_documents) == (5, 0)


def test_coverage_needs_no_corpus(encoder):
    analysis = analyze_tokenizers({"a": encoder}, levels={"one": ("春", "龘")})
    assert analysis.scripts == {}
    assert [row.num_covered for row in analysis.tokenizers[0].coverage] == [1]
    assert analysis.tokenizers[0].encoder.vocab_size == TOY_VOCAB_SIZE


def test_a_sample_is_of_whole_documents_in_order_and_reproducible():
    documents = [Document("x" * (1 + line % 7), "c.jsonl", line) for line in range(1, 200)]
    sample = sample_documents(iter(documents), max_bytes=100, seed=3)
    assert 80 < sum(len(document.text) for document in sample) <= 100
    assert sample == [document for document in documents if document in sample]
    assert sample == sample_documents(iter(documents), max_bytes=100, seed=3)
    assert sample != sample_documents(iter(documents), max_bytes=100, seed=4)
    assert sample_documents(iter(documents), max_bytes=10**9, seed=3) == documents
    assert sample_documents(iter(documents), max_bytes=1, seed=3) in ([], [documents[6]])


@pytest.mark.parametrize(
    "text, name, path",
    [
        ("a=b/c.model", "a", "b/c.model"),
        ("b/c.model", "c", "b/c.model"),
        ("b/folder/", "folder", "b/folder"),
        ("b/bert/tokenizer.json", "bert", "b/bert/tokenizer.json"),
        ("b/x=y.model", "x=y", "b/x=y.model"),
    ],
)
def test_a_tokenizer_is_named_or_named_after_its_file(text, name, path):
    assert parse_named_tokenizer(text) == (name, Path(path))


@pytest.mark.parametrize("text", ["=b.model", "a=", ""])
def test_half_a_name_is_refused(text):
    with pytest.raises(ConfigError, match=f"--tokenizers: each must be NAME=PATH, got '{text}'"):
        parse_named_tokenizer(text)


def test_names_must_differ_and_hold_the_reference(tmp_path):
    named_paths = [("a", tmp_path / "a"), ("b", tmp_path / "b"), ("a", tmp_path / "c")]
    with pytest.raises(ConfigError, match="--tokenizers: names must differ, got a, b, a"):
        load_named_tokenizers(named_paths, None)
    with pytest.raises(ConfigError, match="--reference: must be one of a, b, got c"):
        load_named_tokenizers(named_paths[:2], "c")
