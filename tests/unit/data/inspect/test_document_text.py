"""Documents of a pair as text again: one, a sample, and those that contain a text."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.index_format import bin_path
from megatron_hammer.data.indexed.manifest import Manifest, TokenizerIdentity
from megatron_hammer.data.indexed.pair import IndexSummary, read_index
from megatron_hammer.data.indexed.pair_writer import IndexedWriter
from megatron_hammer.data.inspect import document_text
from megatron_hammer.data.inspect.document_text import (
    choose_samples,
    cut_excerpt,
    describe_ids,
    read_document,
    read_document_ids,
    require_same_tokenizer,
    search_documents,
)
from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from tests.helpers.indexed_writing import add_document
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer

TEXTS = [*TOY_TEXTS, "", "the fox 春眠 again", "nothing of it"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def index(tmp_path: Path, encoder: Encoder) -> IndexSummary:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        for text in TEXTS:
            ids = encoder.encode(text)
            add_document(writer, ids, (3, len(ids) - 3) if len(ids) > 5 else None)
    return read_index(tmp_path / "pair")


def test_a_document_is_its_text(index: IndexSummary, encoder: Encoder) -> None:
    for number, text in enumerate(TEXTS):
        document = read_document(index, encoder, number)
        assert (document.number, document.text) == (number, text)
        assert document.num_tokens == len(encoder.encode(text))


def test_a_document_number_beyond_the_last_is_refused(index: IndexSummary, tmp_path: Path) -> None:
    for number in (-1, len(TEXTS)):
        with pytest.raises(
            ConfigError, match=rf"^document: must lie in 0\.\.5, got {number}\. Choose one of .*pair\.idx"
        ):
            read_document_ids(index, number)
    with IndexedWriter(tmp_path / "none", np.dtype(np.uint16)):
        pass
    with pytest.raises(ConfigError, match=r"^document: needs a pair that holds any, got 0\."):
        read_document_ids(read_index(tmp_path / "none"), 0)


def test_samples_depend_on_the_seed_alone(index: IndexSummary) -> None:
    samples = choose_samples(index, 3, seed=1)
    assert samples == choose_samples(index, 3, seed=1) == tuple(sorted(set(samples)))
    assert any(choose_samples(index, 3, seed=seed) != samples for seed in range(2, 9))
    assert choose_samples(index, 100, seed=1) == tuple(range(len(TEXTS)))


@pytest.mark.parametrize("chunk_bytes", [1, 4 << 20])
@pytest.mark.parametrize("text", ["fox", "春眠", "眠", "e fo", "again", "absent", "nothing of it"])
def test_search_finds_what_the_texts_contain(
    index: IndexSummary, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, text: str
) -> None:
    monkeypatch.setattr(document_text, "CHUNK_BYTES", chunk_bytes)
    matches = list(search_documents(index, encoder, text, max_matches=10))
    assert [match.number for match in matches] == [number for number, whole in enumerate(TEXTS) if text in whole]
    for match in matches:
        assert match.position == TEXTS[match.number].index(text)
        assert text in match.excerpt
    assert list(search_documents(index, encoder, text, max_matches=1)) == matches[:1]


def test_an_empty_search_is_refused(index: IndexSummary, encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match=r"^search: text must not be empty, got ''\."):
        list(search_documents(index, encoder, "", max_matches=1))


def test_an_excerpt_is_one_line() -> None:
    text = "one two\n\nthree four five"
    assert cut_excerpt(text, 9, 14, 4) == "...wo three fou..."
    assert cut_excerpt(text, 0, 3, 100) == "one two three four five"


def test_ids_without_text_are_reported(encoder: Encoder) -> None:
    (token_id,) = encoder.encode("\n")[:1]
    readable = describe_ids(encoder, [int(token_id)])
    assert readable == [repr(encoder.decode([int(token_id)]))]
    assert encoder.eod_id is not None
    assert describe_ids(encoder, [encoder.eod_id]) == [f"id {encoder.eod_id}, no text of its own"]
    byte_id = int(encoder.encode("\u4e28")[-1])  # no piece of the toy model: three bytes
    assert describe_ids(encoder, [byte_id]) == [f"id {byte_id}, no text of its own"]


def test_another_tokenizer_is_refused(encoder: Encoder) -> None:
    values = {field.name: 0 for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING}
    same = TokenizerIdentity(name="toy.model", sha256=encoder.sha256, vocab_size=encoder.vocab_size)
    require_same_tokenizer("p", encoder, None)
    require_same_tokenizer("p", encoder, Manifest(**values | {"tokenizer": same}))  # type: ignore[arg-type]
    other = dataclasses.replace(same, name="other.model", sha256="0" * 64)
    message = (
        r"^p: pair must be read with the tokenizer that encoded it, other\.model \(0{12}\.\.\.\), got .*toy\.model"
    )
    with pytest.raises(DataError, match=message):
        require_same_tokenizer("p", encoder, Manifest(**values | {"tokenizer": other}))  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_are_named(index: IndexSummary, encoder: Encoder, tmp_path: Path) -> None:
    ids = np.fromfile(bin_path(tmp_path / "pair"), dtype=np.uint16)
    ids[0] = encoder.vocab_size
    bin_path(tmp_path / "pair").write_bytes(ids.tobytes())
    message = (
        rf"pair\.bin: document 0 must have ids below vocab_size={encoder.vocab_size}, got id={encoder.vocab_size}\."
    )
    with pytest.raises(DataError, match=message):
        read_document(index, encoder, 0)
    with pytest.raises(DataError, match=message):
        list(search_documents(index, encoder, "fox", max_matches=1))
