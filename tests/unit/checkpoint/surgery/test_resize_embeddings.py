"""A model resized for an extended tokenizer: old logits stay bit for bit, new rows are means, the rest is a copy."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint.surgery import resize_embeddings as module
from megatron_hammer.checkpoint.surgery.resize_embeddings import ResizeOptions, resize_embeddings
from megatron_hammer.errors import ConversionError, DataError, OutputError
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.encoding.sentencepiece_model import (
    Piece,
    PieceType,
    read_sentencepiece_model,
    serialize_sentencepiece_model,
)
from tests.helpers.toy_tokenizer import TOY_TEXTS, TOY_VOCAB_SIZE, train_toy_tokenizer

NEW_PIECES = {"▁the▁quick": PieceType.NORMAL, "龘": PieceType.NORMAL, "<tool>": PieceType.USER_DEFINED,
              "<pad>": PieceType.CONTROL, "不觉晓": PieceType.NORMAL}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_model(folder, *, num_rows=TOY_VOCAB_SIZE, dtype=torch.float32, is_tied=False, **save_options):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=num_rows, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=is_tied, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **save_options)
    return model


@pytest.fixture
def options(tmp_path):
    old = train_toy_tokenizer(tmp_path)
    model = read_sentencepiece_model(old)
    added = [Piece(text, -400.0 - n, piece_type) for n, (text, piece_type) in enumerate(NEW_PIECES.items())]
    (tmp_path / "new.model").write_bytes(
        serialize_sentencepiece_model(dataclasses.replace(model, pieces=(*model.pieces, *added)))
    )
    return ResizeOptions(
        model_dir=tmp_path / "base",
        old_tokenizer_path=old,
        new_tokenizer_path=tmp_path / "new.model",
        save_dir=tmp_path / "hf",
    )


def assert_nothing_was_left(options):
    assert [path.name for path in options.save_dir.parent.iterdir() if path.name.startswith("hf")] == []


def load_all(folder: Path):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def brute_force_rows(options, matrix):
    """In float64, spelt independently: the old tokenizer on the piece's text."""
    old = load_encoder(options.old_tokenizer_path)
    rows = matrix.double().numpy()
    return np.stack([rows[old.encode(text.replace("▁", " "))].mean(axis=0) for text in NEW_PIECES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_transformers_gives_the_same_logits_for_old_ids(options, dtype, is_tied):
    write_model(options.model_dir, dtype=dtype, is_tied=is_tied)
    report = resize_embeddings(options)
    before = transformers.AutoModelForCausalLM.from_pretrained(options.model_dir, dtype="auto")
    # Rows of its own making behind the old ones, so that both products have one shape and thus one order of sums.
    before.resize_token_embeddings(TOY_VOCAB_SIZE + 5, mean_resizing=False)
    after, info = transformers.AutoModelForCausalLM.from_pretrained(
        options.save_dir, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert (after.dtype, after.config.vocab_size) == (dtype, TOY_VOCAB_SIZE + 5)
    assert after.config.tie_word_embeddings == is_tied
    old = load_encoder(options.old_tokenizer_path)
    with torch.no_grad():
        for text in TOY_TEXTS:
            ids = torch.tensor(old.encode(text)[None, :60], dtype=torch.long)
            assert torch.equal(after(ids).logits[..., :TOY_VOCAB_SIZE], before(ids).logits[..., :TOY_VOCAB_SIZE])
    assert report.resized == ((EMBEDDING,) if is_tied else (EMBEDDING, HEAD))
    assert (report.num_old_rows, report.num_new_rows, report.num_added_pieces) == (347, 352, 5)
    assert (report.num_reused_padding_rows, report.num_kept_padding_rows, report.num_unspelled_pieces) == (0, 0, 0)
    assert report.num_copied_tensors == len(load_all(options.model_dir)) - len(report.resized)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2**-22), (torch.bfloat16, 2**-8)])
def test_new_rows_are_the_means_and_everything_else_is_a_copy(options, dtype, tolerance):
    write_model(options.model_dir, dtype=dtype)
    resize_embeddings(options)
    before, after = load_all(options.model_dir), load_all(options.save_dir)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name][: len(tensor)], tensor)
    for name in (EMBEDDING, HEAD):
        new_rows = after[name][TOY_VOCAB_SIZE:].double().numpy()
        expected = brute_force_rows(options, before[name])
        assert abs(new_rows - expected).max() <= tolerance * abs(expected).max()  # half a unit of the last place
        shuffled = before[name][torch.randperm(TOY_VOCAB_SIZE)]
        assert abs(new_rows - brute_force_rows(options, shuffled)).max() > 0.1  # twin: means of other rows


def test_the_folder_is_complete_and_its_tokenizer_the_new_one(options):
    write_model(options.model_dir)
    (options.model_dir / "LICENSE").write_text("MIT")
    (options.model_dir / "README.md").write_text("vocabulary 347")
    (options.model_dir / "chat_template.jinja").write_text("{{ messages }}")
    (options.model_dir / "tokenizer.json").write_text("old")
    (options.model_dir / "tokenizer_config.json").write_text('{"model_max_length": 33}')
    (options.model_dir / "pytorch_model.bin").write_text("old")
    (options.model_dir / "runs").mkdir()
    stages = []
    report = resize_embeddings(options, stages.append)
    assert report.left_out == ("README.md", "pytorch_model.bin", "runs")
    assert "reading back model.safetensors" in stages
    assert sorted(path.name for path in options.save_dir.iterdir()) == [
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.save_dir)
    assert len(tokenizer) == 352
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (33, "{{ messages }}")
    new = load_encoder(options.new_tokenizer_path)
    for text in (*TOY_TEXTS, "龘<tool> the quick不觉晓"):
        assert tokenizer(text)["input_ids"] == new.encode(text).tolist()
    before = json.loads((options.model_dir / "config.json").read_text())
    assert json.loads((options.save_dir / "config.json").read_text()) == before | {"vocab_size": 352}


def test_no_tokenizer_leaves_its_files_out(options):
    write_model(options.model_dir)
    report = resize_embeddings(dataclasses.replace(options, has_tokenizer=False))
    assert not report.has_tokenizer
    assert not list(options.save_dir.glob("tokenizer*"))


@pytest.mark.parametrize("num_padding_rows, reused, kept", [(3, 3, 0), (5, 5, 0), (9, 5, 4)])
def test_new_pieces_take_the_place_of_padding(options, num_padding_rows, reused, kept):
    write_model(options.model_dir, num_rows=TOY_VOCAB_SIZE + num_padding_rows)
    report = resize_embeddings(options)
    assert (report.num_reused_padding_rows, report.num_kept_padding_rows) == (reused, kept)
    before, after = load_all(options.model_dir), load_all(options.save_dir)
    for name in (EMBEDDING, HEAD):
        assert len(after[name]) == report.num_new_rows == TOY_VOCAB_SIZE + max(5, num_padding_rows)
        assert torch.equal(after[name][:TOY_VOCAB_SIZE], before[name][:TOY_VOCAB_SIZE])
        assert torch.equal(after[name][TOY_VOCAB_SIZE + 5 :], before[name][TOY_VOCAB_SIZE + 5 :])
        expected = brute_force_rows(options, before[name])
        assert abs(after[name][TOY_VOCAB_SIZE : TOY_VOCAB_SIZE + 5].double().numpy() - expected).max() < 1e-6
    assert json.loads((options.save_dir / "config.json").read_text())["vocab_size"] == report.num_new_rows


def test_shards_stay_shards(options):
    before = write_model(options.model_dir, max_shard_size="30KB")
    resize_embeddings(options)
    names = sorted(path.name for path in options.model_dir.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in options.save_dir.glob("*.safetensors")) == names
    old, new = (json.loads((folder / "model.safetensors.index.json").read_text())
                for folder in (options.model_dir, options.save_dir))  # fmt: skip
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 2 * 5 * 24 * 4
    assert new["metadata"]["total_parameters"] == before.num_parameters() + 2 * 5 * 24
    assert transformers.AutoModelForCausalLM.from_pretrained(options.save_dir).config.vocab_size == 352


def test_gpt2_has_its_own_name_for_the_embeddings(options):
    config = transformers.GPT2Config(vocab_size=TOY_VOCAB_SIZE, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(options.model_dir)
    assert resize_embeddings(options).resized == ("transformer.wte.weight",)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(options.save_dir, output_loading_info=True)
    assert not any(info.values()), info


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: weights.pop(EMBEDDING),
            "weights must hold model.embed_tokens.weight or transformer.wte.weight",
        ),
        (lambda weights: weights.pop(HEAD), "a model that is not tied must hold lm_head.weight, got none"),
        (lambda weights: weights.update({"lm_head.bias": torch.ones(347)}), "output layer must have no bias, got one"),
        (
            lambda weights: weights.update({HEAD: torch.ones(300, 24)}),
            r"expected a matrix of 347 rows, got \(300, 24\)",
        ),
        (
            lambda weights: weights.update({HEAD: torch.ones(347, 24).double()}),
            "weights must be F32, BF16, F16, got F64",
        ),
        (lambda weights: weights.update({EMBEDDING: torch.ones(340, 24)}), "got vocab_size=347, rows=340"),
    ],
)
def test_weights_that_are_not_understood_are_refused(options, change, message):
    write_model(options.model_dir)
    change_weights(options.model_dir, change)
    with pytest.raises(ConversionError, match=message):
        resize_embeddings(options)
    assert_nothing_was_left(options)


def test_quantised_models_are_refused_with_all_problems_at_once(options):
    write_model(options.model_dir)
    change_config(options.model_dir, quantization_config={}, vocab_size=9)
    with pytest.raises(ConversionError, match="weights must not be quantised, got a quantization_config") as caught:
        resize_embeddings(options)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("num_rows", [TOY_VOCAB_SIZE - 1, TOY_VOCAB_SIZE + 1025])
def test_a_model_of_another_tokenizer_is_refused(options, num_rows):
    write_model(options.model_dir, num_rows=num_rows)
    with pytest.raises(ConversionError, match=rf"must be the model's, .* got 347 pieces for {num_rows:,} rows in "):
        resize_embeddings(options)
    assert_nothing_was_left(options)


def test_tokenizers_that_do_not_fit_are_refused(options):
    write_model(options.model_dir)
    swapped = dataclasses.replace(
        options, old_tokenizer_path=options.new_tokenizer_path, new_tokenizer_path=options.old_tokenizer_path
    )
    with pytest.raises(DataError, match=r"must have more pieces than the old one, got 347 for 352\b"):
        resize_embeddings(swapped)
    assert_nothing_was_left(options)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", None, r"config.json: file cannot be read \(No such file"),
        ("config.json", "{", r"config.json: content must be JSON, got: "),
        ("config.json", "[]", r"config.json: content must be a table, got \[\]"),
        ("model.safetensors", None, r"model.safetensors: weights cannot be read \(No such file"),
        ("model.safetensors", "no", r"model.safetensors: file must be complete safetensors"),
        ("model.safetensors.index.json", "{}", r"index.json: index must hold a weight_map, got none"),
    ],
)
def test_an_incomplete_model_is_named(options, name, content, message):
    write_model(options.model_dir)
    path = options.model_dir / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConversionError, match=message):
        resize_embeddings(options)
    assert_nothing_was_left(options)


def test_a_target_that_holds_something_is_refused(options):
    write_model(options.model_dir)
    with pytest.raises(OutputError, match="base: target must be absent or an empty folder, got "):
        resize_embeddings(dataclasses.replace(options, save_dir=options.model_dir))


def test_a_tokenizer_that_hugging_face_cannot_express_is_refused_before_any_weight_is_written(options):
    from sentencepiece import sentencepiece_model_pb2

    write_model(options.model_dir)
    for path in (options.old_tokenizer_path, options.new_tokenizer_path):
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = True
        path.write_bytes(proto.SerializeToString())
    stages = []
    with pytest.raises(
        ConversionError, match=r"got add_dummy_prefix with user-defined symbols: .* Pass --no-tokenizer"
    ):
        resize_embeddings(options, stages.append)
    assert stages == ["writing the tokenizer"]
    assert_nothing_was_left(options)
    resize_embeddings(dataclasses.replace(options, has_tokenizer=False))
    new_rows = load_all(options.save_dir)[EMBEDDING][TOY_VOCAB_SIZE:].double().numpy()
    plain = dataclasses.replace(options, old_tokenizer_path=train_toy_tokenizer(options.save_dir.parent))
    expected = brute_force_rows(plain, load_all(options.model_dir)[EMBEDDING])
    assert abs(new_rows - expected).max() < 1e-6


def test_twin_a_copy_that_differs_does_not_pass(options, monkeypatch):
    write_model(options.model_dir)
    copy_with_rows = module.copy_with_rows

    def spoil(source, target, inserted):
        copy_with_rows(source, target, inserted)
        content = bytearray(target.read_bytes())
        content[-1] ^= 1
        target.write_bytes(content)

    monkeypatch.setattr(module, "copy_with_rows", spoil)
    with pytest.raises(ConversionError, match=r"self_attn.v_proj.weight|norm.weight: what was written must read back"):
        resize_embeddings(options)
    assert_nothing_was_left(options)


def test_twin_a_tokenizer_that_transformers_reads_otherwise_leaves_nothing(options, monkeypatch):
    write_model(options.model_dir)
    export_tokenizer = module.export_tokenizer

    def spoil(source, target_dir, *, max_length):
        export_tokenizer(source, target_dir, max_length=max_length)
        path = target_dir / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))

    monkeypatch.setattr(module, "export_tokenizer", spoil)
    with pytest.raises(ConversionError, match="sample text:2: transformers must decode the ids as the original does"):
        resize_embeddings(options)
    assert_nothing_was_left(options)


def test_hugging_face_tokenizers_are_copied(options, tmp_path):
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(TOY_TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    num_old = fast.get_vocab_size()
    for name, added in (("old", []), ("new", ["<|tool|>", "龘"])):
        fast.add_tokens(added)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast._tokenizer, eos_token="<|endoftext|>")
        wrapped.save_pretrained(tmp_path / name)
    write_model(options.model_dir, num_rows=num_old)
    options = dataclasses.replace(
        options, old_tokenizer_path=tmp_path / "old", new_tokenizer_path=tmp_path / "new" / "tokenizer.json"
    )
    assert resize_embeddings(options).num_added_pieces == 2
    before, after = load_all(options.model_dir)[EMBEDDING], load_all(options.save_dir)[EMBEDDING]
    ids = load_encoder(tmp_path / "old").encode("龘").tolist()
    assert torch.equal(after[num_old + 1], before[ids].mean(dim=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.save_dir)
    assert tokenizer("龘<|tool|>")["input_ids"] == [num_old + 1, num_old]
