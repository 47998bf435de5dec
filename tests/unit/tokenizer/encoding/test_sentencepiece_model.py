"""A `.model` file is read as sentencepiece reads it, and writing is the exact inverse of reading."""

import dataclasses
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    Piece,
    PieceType,
    parse_sentencepiece_model,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
    set_trainer_settings,
)
from tests.helpers.repository import SHARED_DATA, needs_shared_data
from tests.helpers.toy_tokenizer import train_toy_tokenizer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pieces_and_settings_are_sentencepieces_own(model_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    model = read_sentencepiece_model(model_path)
    assert len(model.pieces) == processor.get_piece_size()
    for token_id, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (processor.id_to_piece(token_id), processor.get_score(token_id))
        assert (piece.type is PieceType.BYTE) == processor.is_byte(token_id)
        assert (piece.type is PieceType.CONTROL) == processor.is_control(token_id)
        assert (piece.type is PieceType.UNKNOWN) == processor.is_unknown(token_id)
    assert (model.model_type, model.has_byte_fallback, model.has_dummy_prefix) == ("bpe", True, False)
    assert (model.removes_extra_whitespaces, model.escapes_whitespaces) == (False, True)
    assert (model.treats_whitespace_as_suffix, model.precompiled_charsmap) == (False, b"")


def test_writing_is_the_inverse_of_reading(model_path: Path) -> None:
    assert serialize_sentencepiece_model(read_sentencepiece_model(model_path)) == model_path.read_bytes()


@needs_shared_data
@pytest.mark.parametrize("name", ["hammerllm", "hammerllm-trained-128k", "internlm-7b", "llama2-7b"])
def test_writing_is_the_inverse_of_reading_for_published_models(name: str) -> None:
    path = SHARED_DATA / "tokenizer" / f"{name}.model"
    assert serialize_sentencepiece_model(read_sentencepiece_model(path)) == path.read_bytes()


def test_an_edited_model_keeps_every_setting(model_path: Path) -> None:
    model = read_sentencepiece_model(model_path)
    added = (Piece("鱻", -123.5, PieceType.NORMAL), Piece("<new>", 0.0, PieceType.USER_DEFINED))
    data = serialize_sentencepiece_model(dataclasses.replace(model, pieces=(*model.pieces, *added)))
    assert parse_sentencepiece_model(data).pieces == (*model.pieces, *added)
    before = sentencepiece_model_pb2.ModelProto.FromString(model_path.read_bytes())
    after = sentencepiece_model_pb2.ModelProto.FromString(data)
    assert after.trainer_spec == before.trainer_spec
    assert after.normalizer_spec == before.normalizer_spec
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert processor.encode("鱻<new>", out_type=str) == ["鱻", "<new>"]


def test_trainer_settings_change_alone(model_path: Path) -> None:
    data = set_trainer_settings(model_path.read_bytes(), num_threads=17)
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    assert model.trainer_spec.num_threads == 17
    assert set_trainer_settings(data, num_threads=1) == set_trainer_settings(model_path.read_bytes(), num_threads=1)
    assert parse_sentencepiece_model(data).pieces == read_sentencepiece_model(model_path).pieces


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff", b"\x0a\x00", b"\x0a\x03\x0a\x01\xff"])
def test_a_file_that_is_not_a_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken.model: file must be a SentencePiece.*got something else"):
        read_sentencepiece_model(path)


def test_a_truncated_model_is_named(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.model"
    path.write_bytes(model_path.read_bytes()[:-9])
    with pytest.raises(DataError, match="file must be a SentencePiece model"):
        read_sentencepiece_model(path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.model: file cannot be read \(No such file or directory\)."):
        read_sentencepiece_model(tmp_path / "absent.model")
