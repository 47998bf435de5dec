"""Texts become the ids that Megatron-LM's tool writes, with the tokens that begin and end documents in their places."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.corpus.blocks import read_blocks, select_whole_files
from megatron_hammer.data.preprocess.block_encoder import (
    BlockEncoder,
    EncodedField,
    add_ends,
    count_utf8_bytes,
    require_bos_id,
)
from megatron_hammer.data.preprocess.options import PreprocessOptions
from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from tests.helpers.toy_tokenizer import train_toy_tokenizer, write_jsonl

TEXTS = ["the fox", "", "def add", "", "", "春眠"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def encode(folder: Path, encoder: Encoder, texts: list[str], **options) -> EncodedField:
    path = write_jsonl(folder / "c.jsonl", texts)
    (block,) = read_blocks(select_whole_files([path]), ["text"])
    settings = PreprocessOptions(inputs=(), tokenizer_path=encoder.path, output_prefix=folder, **options)
    (field,) = BlockEncoder(settings, encoder).encode(block).fields
    return field


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eod", [False, True])
def test_documents_begin_and_end_with_their_tokens(tmp_path: Path, encoder: Encoder, bos: bool, eod: bool) -> None:
    field = encode(tmp_path, encoder, TEXTS, prepend_bos=bos, append_eod=eod)
    expected = [
        [*([1] if bos else []), *encoder.encode(text).tolist(), *([2] if eod else [])] for text in TEXTS if text
    ]
    assert field.ids.tolist() == [token for ids in expected for token in ids]
    assert field.ids.dtype == np.uint16
    assert field.sequence_lengths.tolist() == [len(ids) for ids in expected]
    assert field.sequences_per_document.tolist() == [1, 0, 1, 0, 0, 1]
    assert field.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_texts_that_are_all_empty_give_no_token(tmp_path: Path, encoder: Encoder) -> None:
    field = encode(tmp_path, encoder, ["", ""], prepend_bos=True, append_eod=True)
    assert field.ids.tolist() == field.sequence_lengths.tolist() == []
    assert field.sequences_per_document.tolist() == [0, 0]


def test_ends_of_documents_of_several_sequences() -> None:
    ids, lengths = add_ends(
        np.arange(10, 19, dtype=np.uint16), np.array([2, 3, 1, 3]), np.array([2, 3, 4]), before=[7], after=[7]
    )
    assert ids.tolist() == [7, 10, 11, 12, 13, 14, 7, 7, 15, 7, 7, 16, 17, 18, 7]
    assert lengths.tolist() == [3, 4, 3, 5]


def test_ends_of_empty_texts() -> None:
    ids, lengths = add_ends(
        np.array([3], dtype=np.uint16), np.array([0, 1, 0]), np.arange(1, 4), before=[7, 8], after=[9]
    )
    assert ids.tolist() == [7, 8, 9, 7, 8, 3, 9, 7, 8, 9]
    assert lengths.tolist() == [3, 4, 3]


def test_a_tokenizer_without_bos_is_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_bos_id(encoder) == 1
    monkeypatch.setitem(encoder.special_tokens.ids, "bos_token", None)
    message = r"toy.model: tokenizer must have a token that begins a document, got none. Name it as bos_token in token"
    with pytest.raises(DataError, match=message):
        require_bos_id(encoder)


@pytest.mark.parametrize(
    "texts", [[], [""], ["abc"], ["é", "中文", "\U0001f980x"], ["߿ࠀ\uffff\U00010000"] * 3, ["中" * (1 << 22) + "a"]]
)
def test_bytes_are_counted_as_encoding_would(texts: list[str]) -> None:
    assert count_utf8_bytes(texts) == len("".join(texts).encode("utf-8"))
