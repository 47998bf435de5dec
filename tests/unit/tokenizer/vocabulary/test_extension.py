"""Which old pieces spell a new one, and which tokenizers extend another."""

import dataclasses

import pytest
import tokenizers

from megatron_hammer.errors import DataError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    Piece,
    PieceType,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from megatron_hammer.tokenizer.vocabulary.extension import spell_new_pieces, validate_extension
from tests.helpers.toy_tokenizer import TOY_TEXTS, train_toy_tokenizer

NEW_PIECES = (
    Piece("▁the▁quick", -400.0, PieceType.NORMAL),
    Piece("龘", -401.0, PieceType.NORMAL),
    Piece("<tool>", 0.0, PieceType.USER_DEFINED),
    Piece("<pad>", 0.0, PieceType.CONTROL),
    Piece("never", 0.0, PieceType.UNUSED),
)


def extend(source, target, pieces=NEW_PIECES):
    model = read_sentencepiece_model(source)
    target.write_bytes(serialize_sentencepiece_model(dataclasses.replace(model, pieces=(*model.pieces, *pieces))))
    return load_encoder(target)


def test_sentencepiece_spells_new_pieces_with_old_ones(tmp_path):
    old = load_encoder(train_toy_tokenizer(tmp_path))
    new = extend(old.path, tmp_path / "new.model")
    validate_extension(old, new)
    spellings = list(spell_new_pieces(old, new))
    texts = [" the quick", "龘", "<tool>", "<pad>"]
    assert spellings == [*(old.encode(text).tolist() for text in texts), []]
    assert len(spellings[1]) == 3  # its bytes


def test_a_dummy_prefix_is_not_a_part_of_any_piece(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    plain = load_encoder(train_toy_tokenizer(tmp_path))
    proto = sentencepiece_model_pb2.ModelProto.FromString(plain.path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "prefix.model").write_bytes(proto.SerializeToString())
    old = load_encoder(tmp_path / "prefix.model")
    new = extend(old.path, tmp_path / "new.model", (*NEW_PIECES, Piece("▁▁x", -500.0, PieceType.NORMAL)))
    expected = [plain.encode(text).tolist() for text in (" the quick", "龘", "<tool>", "<pad>")]
    assert list(spell_new_pieces(old, new)) == [*expected, [], plain.encode("  x").tolist()]
    assert old.encode("龘").tolist() != expected[1]  # twin: whole texts do get a prefix


def test_hugging_face_tokens_are_spelt_past_the_pre_tokenizer(tmp_path):
    old, new = write_byte_level(tmp_path / "old", []), write_byte_level(tmp_path / "new", ["<|tool|>", "龘 x"])
    validate_extension(old, new)
    assert list(spell_new_pieces(old, new)) == [old.encode("<|tool|>").tolist(), old.encode("龘 x").tolist()]


def test_hugging_face_vocabularies_that_grew_are_spelt_by_their_merges(tmp_path):
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4}
    old = write_bpe(tmp_path / "old", vocabulary, [("a", "b")])
    new = write_bpe(tmp_path / "new", vocabulary | {"▁ab": 5, "abc": 6, "zz": 7}, [("a", "b"), ("▁", "ab")])
    assert list(spell_new_pieces(old, new)) == [[1, 4], [4], []]


def write_bpe(folder, vocabulary, merges):
    folder.mkdir()
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Prepend("▁")
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_encoder(folder)


def write_byte_level(folder, added):
    folder.mkdir()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TOY_TEXTS, vocab_size=300, show_progress=False)
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_encoder(folder)


def test_a_changed_id_is_named(tmp_path):
    old = load_encoder(train_toy_tokenizer(tmp_path))
    model = read_sentencepiece_model(old.path)
    pieces = list(model.pieces)
    pieces[300], pieces[310] = pieces[310], pieces[300]
    (tmp_path / "new.model").write_bytes(
        serialize_sentencepiece_model(dataclasses.replace(model, pieces=(*pieces, *NEW_PIECES)))
    )
    message = f"ids of the old tokenizer must keep their pieces, got '{pieces[300].text}' at id=300 for "
    with pytest.raises(DataError, match=message):
        validate_extension(old, load_encoder(tmp_path / "new.model"))


def test_smaller_equal_and_unlike_tokenizers_are_refused(tmp_path):
    old = load_encoder(train_toy_tokenizer(tmp_path))
    new = extend(old.path, tmp_path / "new.model")
    with pytest.raises(DataError, match=r"must have more pieces than the old one, got 347 for 347\b"):
        validate_extension(old, old)
    with pytest.raises(DataError, match=r"must have more pieces than the old one, got 347 for 352\b"):
        validate_extension(new, old)
    with pytest.raises(DataError, match="of one kind, got a Hugging Face tokenizer beside a SentencePiece model"):
        validate_extension(old, write_byte_level(tmp_path / "hf", []))
