"""Old rows stay, new ones are means, moments of new ones are zero, in the weights and in the optimizer alike."""

import re
from pathlib import Path

import pytest
import torch

from megatron_hammer.checkpoint.surgery.new_rows import mean_of_all
from megatron_hammer.checkpoint.surgery.resize_vocabulary import NewVocabulary, resize_vocabulary
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.toy_tokenizer import train_toy_tokenizer
from tests.helpers.toy_training_checkpoint import (
    model_tensors,
    optimizer_state,
    optimizer_tensors,
    read_all,
    training_arguments,
    write_training_checkpoint,
)

MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")


def write_bf16(folder, master="param"):
    model = model_tensors(dtype=torch.bfloat16)
    return write_training_checkpoint(folder, tensors={**model, **optimizer_tensors(model, master=master)})


@pytest.mark.parametrize("master", ["param", "fp32_param"])
def test_more_tokens(tmp_path, master):
    tensors = write_bf16(tmp_path / "old", master)
    report = resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=70))
    found, store = read_all(tmp_path / "new")
    args = store.common_state["args"]
    assert (args.vocab_size, args.padded_vocab_size) == (70, 80)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if not key.endswith(MATRICES):
            assert torch.equal(found[key], tensor)
            continue
        assert found[key].shape == (80, 24)
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key][:53], tensor[:53])
        assert not found[key][70:].any()
    for name in MATRICES:
        mean = mean_of_all(tensors[f"optimizer.state.{master}.{name}"][:53])
        assert torch.equal(found[f"optimizer.state.{master}.{name}"][53:70], mean.expand(17, 24))
        # The model's rows are the master's rounded, which is not the mean of the rounded rows.
        assert torch.equal(found[name][53:70], mean.bfloat16().expand(17, 24))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not found[f"optimizer.state.{moment}.{name}"][53:].any()
    assert store.common_state["optimizer"] == optimizer_state()
    assert (report.num_new_rows, report.num_spelled, report.num_padded_rows_before) == (17, 0, 64)
    assert report.num_copied_tensors == 4 * 7


def test_fewer_tokens(tmp_path):
    tensors = write_training_checkpoint(tmp_path / "old")
    resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=37))
    found, store = read_all(tmp_path / "new")
    assert (store.common_state["args"].vocab_size, store.common_state["args"].padded_vocab_size) == (37, 48)
    for key, tensor in tensors.items():
        if key.endswith(MATRICES):
            assert torch.equal(found[key][:37], tensor[:37])
            assert not found[key][37:].any()
    assert len(store.objects) == 3  # the layout is the same, and so are the ranks' states


def test_weights_alone_and_tied_embeddings(tmp_path):
    model = {key: tensor for key, tensor in model_tensors().items() if key != "output_layer.weight"}
    arguments = training_arguments(untie_embeddings_and_output_weights=False)
    write_training_checkpoint(tmp_path / "old", tensors=model, arguments=arguments, iteration=None)
    report = resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=60))
    found, _ = read_all(tmp_path / "new", "release")
    assert report.resized == ("embedding.word_embeddings.weight",)
    expected = model["embedding.word_embeddings.weight"][:53].double().mean(dim=0).float()
    assert torch.equal(found["embedding.word_embeddings.weight"][53:60], expected.expand(7, 24))


def test_the_boxes_of_tensor_ranks_hold_the_same_rows(tmp_path):
    """New rows that begin in one rank's box and end in another's."""
    tensors = write_training_checkpoint(
        tmp_path / "old", arguments=training_arguments(tensor_model_parallel_size=2, world_size=2)
    )
    resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=120))
    found, store = read_all(tmp_path / "new")
    assert [chunk.sizes for chunk in store.tensors["output_layer.weight"].chunks] == [(64, 24), (64, 24)]
    mean = mean_of_all(tensors["optimizer.state.param.output_layer.weight"][:53])
    assert torch.equal(found["output_layer.weight"][53:120], mean.expand(67, 24))


def test_new_pieces_are_the_means_of_those_that_spell_them(tmp_path):
    old, new = write_extension(tmp_path)
    num_old, num_new = old[1], new[1]
    model = model_tensors()
    rows = torch.randn(2, -(-num_old // 16) * 16, 24, generator=torch.Generator().manual_seed(8))
    model |= dict(zip(MATRICES, rows, strict=True))
    arguments = training_arguments(vocab_size=num_old, tokenizer_model=str(old[0]))
    write_training_checkpoint(tmp_path / "run", tensors={**model, **optimizer_tensors(model)}, arguments=arguments)
    report = resize_vocabulary(tmp_path / "run", tmp_path / "out", NewVocabulary(new_tokenizer_path=new[0]))
    found, store = read_all(tmp_path / "out")
    args = store.common_state["args"]
    assert (args.vocab_size, args.tokenizer_model) == (num_new, str(new[0]))
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(old[0]))
    extended = sentencepiece.SentencePieceProcessor(model_file=str(new[0]))
    num_spelled = 0
    for token in range(num_old, num_new):
        ids = [i for i in processor.encode(extended.id_to_piece(token)) if i != processor.unk_id()]
        ids = [i for i in ids if processor.id_to_piece(i) != "\u2581"] or ids
        if ids and not extended.id_to_piece(token).startswith("\u2581"):
            num_spelled += 1
            for name in MATRICES:
                assert torch.equal(found[name][token], model[name][ids].mean(dim=0))
    assert num_spelled > 3
    assert report.num_spelled >= num_spelled
    assert report.num_new_rows == num_new - num_old


def write_extension(folder):
    """(path, pieces) of a toy tokenizer and of one that has three more pieces behind its own."""
    from sentencepiece import sentencepiece_model_pb2

    path = train_toy_tokenizer(folder)
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    num_old = len(proto.pieces)
    plain = [piece.piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    texts = [text for text in plain if not text.startswith("\u2581")]
    for number in range(5):
        piece = proto.pieces.add()
        piece.piece, piece.score = texts[number] + texts[number + 1] + texts[number + 2], -100.0 - number
    (folder / "extended.model").write_bytes(proto.SerializeToString())
    return (path, num_old), (folder / "extended.model", len(proto.pieces))


@pytest.mark.parametrize(
    ("vocabulary", "text"),
    [
        (NewVocabulary(), "vocab-size: must be given where no new tokenizer is. Pass one of the two."),
        (NewVocabulary(vocab_size=53), "vocab-size: must be another than the model's, got vocab_size=53, 53 in"),
        (NewVocabulary(vocab_size=0, new_tokenizer_path=Path("a")), "vocab-size: must be from 1 to 100,000,000, got"),
        (NewVocabulary(vocab_size=10**13), "vocab-size: must be from 1 to 100,000,000, got vocab_size=10000000000000."),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, vocabulary, text):
    write_training_checkpoint(tmp_path / "old")
    with pytest.raises(ConversionError, match=re.escape(text)):
        resize_vocabulary(tmp_path / "old", tmp_path / "new", vocabulary)


def test_another_models_tokenizer_is_refused(tmp_path):
    old, new = write_extension(tmp_path)
    write_training_checkpoint(tmp_path / "run")
    vocabulary = NewVocabulary(old_tokenizer_path=old[0], new_tokenizer_path=new[0])
    text = f"{old[0]}: old tokenizer must be the model's, with at most 1,024 rows of padding, got {old[1]:,} pieces for"
    with pytest.raises(ConversionError, match=re.escape(text)):
        resize_vocabulary(tmp_path / "run", tmp_path / "new", vocabulary)
    vocabulary = NewVocabulary(new_tokenizer_path=new[0])
    with pytest.raises(ConversionError, match="old-tokenizer-model: must be known to spell new pieces, got none"):
        resize_vocabulary(tmp_path / "run", tmp_path / "new", vocabulary)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"vocab_size": None}, "arguments must hold vocab_size, got none."),
        ({"vocab_size": 65}, "output_layer.weight: must have at least a row for each of the 65 tokens, got 64 in"),
    ],
)
def test_arguments_that_are_not_the_models(tmp_path, arguments, text):
    write_training_checkpoint(tmp_path / "old", arguments=training_arguments(**arguments))
    with pytest.raises(CheckpointError, match=re.escape(text)):
        resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=70))


def test_an_optimizer_that_is_not_stored_by_parameter_is_refused(tmp_path):
    write_training_checkpoint(tmp_path / "old", sharding="dp_zero_gather_scatter")
    text = "got dp_zero_gather_scatter. Drop the optimizer first, with the subcommand weights-only."
    with pytest.raises(CheckpointError, match=re.escape(text)):
        resize_vocabulary(tmp_path / "old", tmp_path / "new", NewVocabulary(vocab_size=70))
