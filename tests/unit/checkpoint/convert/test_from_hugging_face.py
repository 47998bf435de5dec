"""A Hugging Face folder becomes a checkpoint tensor by tensor; every fault is named, and then nothing is written."""

import argparse
import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_hammer.checkpoint.convert import from_hugging_face as import_hf
from megatron_hammer.checkpoint.convert import weight_import
from megatron_hammer.checkpoint.convert.carried_fields import find_descriptions
from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face
from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint.hugging_face.config_json import interpret_config
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_dropout, read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP, QKV, TensorLayout
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint_files.open_checkpoint import open_checkpoint
from megatron_hammer.checkpoint_files.torch_dist.store import TorchDistStore
from megatron_hammer.checkpoint_files.torch_dist.writer import CheckpointWriter
from megatron_hammer.errors import ConversionError, DataError, OutputError
from tests.helpers.messages import assert_problems
from tests.helpers.toy_hf_folder import LLAMA_CONFIG, draw_hf_weights, write_toy_folder
from tests.helpers.toy_tokenizer import TOY_VOCAB_SIZE, train_toy_tokenizer

QKV_NAMES = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "hf"


def convert(folder, *, verify="tensors", **options):
    save_dir = folder.with_name("save")
    return import_from_hugging_face(ImportOptions(hf_dir=folder, save_dir=save_dir, verify=verify, **options))


def export(folder, **options):
    """The checkpoint that `convert` wrote, as a Hugging Face folder again; returns its weights."""
    target = folder.with_name("again")
    export_to_hugging_face(
        ExportOptions(load_dir=folder.with_name("save"), save_dir=target, verify="tensors", **options)
    )
    return load_file(target / "model.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype, name
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("max_chunk_bytes", [700, 1 << 20])
def test_the_folder_comes_back_bit_for_bit(folder, monkeypatch, max_chunk_bytes):
    monkeypatch.setattr(weight_import, "MAX_CHUNK_BYTES", max_chunk_bytes)
    weights = write_toy_folder(folder)
    progress = []
    options = ImportOptions(hf_dir=folder, save_dir=folder.with_name("save"), verify="tensors")
    report = import_from_hugging_face(options, lambda done, total: progress.append((done, total)))
    assert (report.num_hf_tensors, report.num_megatron_tensors, report.num_skipped) == (30, 21, 0)
    assert report.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert report.dtype == "bfloat16"
    assert report.checks == (
        CheckRow("tensors read back and split again", "all 30 equal, bit for bit", True),
        CheckRow("Megatron against transformers", "not compared: --verify tensors", None),
    )
    assert progress[-1] == (report.num_parameters, report.num_parameters)
    assert len(progress) == 21
    assert_equal(weights, export(folder))


def test_the_same_keys_are_stored_as_megatron_stores(folder):
    """One QKV tensor for all layers, gate over up in fc1, no padding; and Megatron's objects beside them."""
    weights = write_toy_folder(folder)
    convert(folder)
    store = TorchDistStore(folder.with_name("save") / "release")
    store.validate()
    shapes = {key: stored.shape for key, stored in store.tensors.items()}
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (3, 40, 24)
    assert shapes["embedding.word_embeddings.weight"] == (53, 24)
    fc1 = store.read("decoder.layers.mlp.linear_fc1.weight", (2, 0, 0), (1, 40, 24))[0]
    gate, up = (weights[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(fc1, torch.cat([gate, up]))
    assert not torch.equal(fc1, torch.cat([up, gate]))
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_2_3" in store.objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in store.objects
    assert store.read_object("decoder.layers.self_attention.linear_proj._extra_state/shard_0_3") == [None]
    assert (store.common_state["iteration"], store.common_state["checkpoint_version"]) == (0, 3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 10, "rope_theta": 5e5},
    ],
)
def test_the_saved_arguments_are_the_architecture(folder, changes):
    write_toy_folder(folder, **changes)
    convert(folder)
    reader = open_checkpoint(folder.with_name("save"))
    assert reader.args.imported_from == "hf"
    assert (read_saved_model(reader.args), read_saved_dropout(reader.args)) == interpret_config(LLAMA_CONFIG | changes)
    assert not hasattr(reader.args, "padded_vocab_size")
    assert (reader.args.bf16, reader.args.params_dtype, reader.args.consumed_train_samples) == (True, torch.bfloat16, 0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_dtype(folder, dtype):
    weights = write_toy_folder(folder, dtype=torch.float32)
    report = convert(folder, dtype=dtype)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert report.dtype == str(expected).removeprefix("torch.")
    assert_equal({name: tensor.to(expected) for name, tensor in weights.items()}, export(folder))
    assert open_checkpoint(folder.with_name("save")).args.precision == dtype


def test_mixed_dtypes_are_kept_where_nothing_is_merged(folder):
    """Norms in fp32 among weights in bf16 stay; one part of QKV in fp32 takes the other two along, exactly."""
    weights = draw_hf_weights(LLAMA_CONFIG)
    wide = [name for name in weights if "norm" in name] + QKV_NAMES[:1]
    weights |= {name: torch.randn(weights[name].shape) for name in wide}
    write_toy_folder(folder, weights=weights)
    assert convert(folder).dtype == "bfloat16, float32"
    tensors = open_checkpoint(folder.with_name("save")).tensors
    assert tensors["output_layer.weight"].dtype == torch.bfloat16
    assert tensors["decoder.final_layernorm.weight"].dtype == torch.float32
    assert tensors["decoder.layers.0.self_attention.linear_qkv.weight"].dtype == torch.float32
    assert_equal({name: tensor.float() for name, tensor in weights.items()}, export(folder))


GENERATION = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [7, 3, 50],
    "pad_token_id": 5,
    "temperature": 0.6,
    "top_p": 0.9,
}


def read_json(path):
    return json.loads(path.read_text())


def test_ends_of_a_text_padding_and_settings_come_back(folder):
    """What Megatron has no place for is kept beside the weights."""
    others = {"bos_token_id": 1, "eos_token_id": [7, 3, 50], "pad_token_id": 5, "pretraining_tp": 1, "use_cache": False}
    write_toy_folder(folder, **others, id2label={"0": "a"}, auto_map={"AutoConfig": "own.Config"})
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    convert(folder)
    report = export_to_hugging_face(
        ExportOptions(load_dir=folder.with_name("save"), save_dir=folder.with_name("back"), verify="tensors")
    )
    config = read_json(folder.with_name("back") / "config.json")
    assert {name: config[name] for name in others} == others
    assert config["id2label"] == {"0": "a"}
    assert config["rope_theta"] == 20_000
    assert "auto_map" not in config
    assert any(note.startswith("config.json, auto_map: left out") for note in report.notes)
    assert read_json(folder.with_name("back") / "generation_config.json") == GENERATION


@pytest.mark.parametrize("content", ["[]", "{", "7"])
def test_a_broken_generation_config_is_named_before_anything_is_written(folder, content):
    write_toy_folder(folder)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ConversionError, match=r"generation_config\.json: content must be"):
        convert(folder)
    assert not folder.with_name("save").exists()


def test_an_adapter_that_transformers_would_add_is_refused(folder):
    write_toy_folder(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConversionError, match=r"adapter_config\.json: .* must hold no adapter, got one\. Merge it"):
        convert(folder)


def test_a_source_without_a_file_or_a_field_gets_none(folder):
    write_toy_folder(folder)
    convert(folder)
    export(folder)
    assert not (folder.with_name("again") / "generation_config.json").exists()
    assert not {"eos_token_id", "bos_token_id"} & read_json(folder.with_name("again") / "config.json").keys()


def test_ids_that_the_exported_model_does_not_have_are_left_out_by_name(folder):
    write_toy_folder(folder, pad_token_id=52, eos_token_id=[7, 51])
    convert(folder)
    options = ExportOptions(
        load_dir=folder.with_name("save"), save_dir=folder.with_name("back"), verify="tensors", vocab_size=51
    )
    report = export_to_hugging_face(options)
    config = read_json(folder.with_name("back") / "config.json")
    assert (config["eos_token_id"], "pad_token_id" in config) == ([7], False)
    assert_problems(
        [note for note in report.notes if "token_id" in note],
        *[
            ("config.json, pad_token_id:", "left out", "51 tokens", "got [52]"),
            ("config.json, eos_token_id:", "left out", "51 tokens", "got [51]"),
        ],
    )


def test_a_run_that_continues_an_import_exports_what_the_import_had(tmp_path):
    """Its own folder has no copy; its arguments name the tokenizer that lies beside one."""
    base = tmp_path / "base" / "release"
    (base / "tokenizer").mkdir(parents=True)
    (base / "hugging_face").mkdir()
    (base / "hugging_face" / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"eos_token_id": [4, 2]}))
    found = find_descriptions(argparse.Namespace(tokenizer_model=str(base / "tokenizer")), tmp_path / "iter_0000003")
    assert (found.config["eos_token_id"], found.generation) == ([4, 2], None)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    started = argparse.Namespace(tokenizer_model=None, load_hf=str(tmp_path / "hf"))
    assert find_descriptions(started, tmp_path / "iter_0000003").directory == tmp_path / "hf"
    assert find_descriptions(argparse.Namespace(), tmp_path / "iter_0000003") is None


def test_a_tied_head_that_is_a_copy_is_left_out(folder):
    weights = draw_hf_weights(LLAMA_CONFIG | {"tie_word_embeddings": True})
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    write_toy_folder(folder, weights=weights | head, tie_word_embeddings=True)
    report = convert(folder)
    assert report.num_skipped == 1
    assert "lm_head.weight was left out: it is a copy of model.embed_tokens.weight" in report.notes[-1]
    assert_equal(weights, export(folder))


def test_a_tied_head_that_differs_is_refused(folder):
    weights = draw_hf_weights(LLAMA_CONFIG)
    write_toy_folder(folder, weights=weights, tie_word_embeddings=True)
    assert_refused(folder, r"lm_head.weight must equal model.embed_tokens.weight, since config.json ties them")


def assert_refused(folder, match, **options):
    with pytest.raises((ConversionError, DataError, OutputError), match=match) as caught:
        convert(folder, **options)
    assert not list(folder.parent.glob("save*"))
    return caught.value


def test_every_value_that_is_not_finite_is_named(folder):
    weights = draw_hf_weights(LLAMA_CONFIG)
    weights["model.layers.2.mlp.up_proj.weight"][7, 5] = float("nan")
    weights["model.norm.weight"][3] = float("inf")
    weights[QKV_NAMES[2]][0, 0] = float("-inf")
    write_toy_folder(folder, weights=weights)
    error = assert_refused(folder, r"norm.weight: weights must be finite in bfloat16, got NaN or infinity in .*hf")
    assert [problem.split(":")[0] for problem in error.problems] == [
        QKV_NAMES[2],
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_a_value_too_large_for_the_dtype_is_named(folder):
    weights = draw_hf_weights(LLAMA_CONFIG)
    weights["lm_head.weight"][5, 5] = 70_000.0
    write_toy_folder(folder, weights=weights)
    assert_refused(folder, "lm_head.weight: weights must be finite in float16", dtype="fp16")


def test_names_shapes_and_dtypes_are_compared_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "__init__", None)
    weights = draw_hf_weights(LLAMA_CONFIG)
    weights["model.norm.weight"] = torch.randn(25)
    weights["model.layers.0.extra.weight"] = weights.pop("model.layers.1.mlp.down_proj.weight")
    weights["lm_head.weight"] = torch.ones(53, 24, dtype=torch.int8)
    write_toy_folder(folder, weights=weights)
    error = assert_refused(folder, r"model.norm.weight: expected shape \(24,\), got \(25,\)")
    problems = "\n".join(error.problems)
    assert "model.layers.1.mlp.down_proj.weight: the architecture needs it with shape (24, 20), got none" in problems
    assert "model.layers.0.extra.weight: nothing maps it" in problems
    assert "lm_head.weight must be bf16, fp16 or fp32, got torch.int8. Pass the model before quantization" in problems
    assert len(error.problems) == 4


def test_more_layers_than_tensors_are_refused_before_they_are_named(folder):
    write_toy_folder(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"num_hidden_layers": 10**9}))
    with pytest.raises(
        ConversionError, match=r"num_hidden_layers: must fit the weights, got .*=1,000,000,000 for \d+ t"
    ):
        import_hf.open_hf_folder(folder)


def test_an_unsupported_config_is_refused(folder):
    write_toy_folder(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"model_type": "mamba"}))
    assert_refused(folder, "model_type: must be one of ")


@pytest.mark.parametrize("broken, name", [(QKV, QKV_NAMES[1]), (GATE_UP, "model.layers.1.mlp.gate_proj.weight")])
def test_a_layout_whose_inverse_is_wrong_is_noticed(folder, monkeypatch, broken, name):
    """Merging in another order than splitting: k for v, and up for gate."""
    write_toy_folder(folder)
    order = {3: (0, 2, 1), 2: (1, 0)}
    original = broken.merge
    swapped = TensorLayout(
        split=broken.split, merge=lambda parts, model: original([parts[n] for n in order[len(parts)]], model)
    )
    open_folder = import_hf.open_hf_folder

    def open_with_swapped(path):
        source = open_folder(path)
        pairs = [dataclasses.replace(pair, layout=swapped) if pair.layout is broken else pair for pair in source.pairs]
        return dataclasses.replace(source, pairs=pairs)

    monkeypatch.setattr(import_hf, "open_hf_folder", open_with_swapped)
    error = assert_refused(folder, "must read back equal, got a difference in ")
    assert len(error.problems) == 3 * 2  # both that were exchanged, of every layer
    assert any(problem.startswith(f"{name}: what was written as decoder.layers.1.") for problem in error.problems)


def test_a_disk_that_changes_a_bit_is_noticed(folder, monkeypatch):
    write_toy_folder(folder)
    read_chunk = CheckpointWriter.read_chunk

    def read_changed(writer, key, offsets):
        tensor = read_chunk(writer, key, offsets)
        if key == "output_layer.weight":
            tensor.view(torch.uint8)[-1, -1] ^= 1
        return tensor

    monkeypatch.setattr(CheckpointWriter, "read_chunk", read_changed)
    error = assert_refused(folder, r"lm_head.weight: what was written as output_layer.weight must read back equal")
    assert len(error.problems) == 1


def test_a_failed_comparison_with_transformers_leaves_nothing(folder, monkeypatch):
    write_toy_folder(folder)
    rows = [CheckRow("logits", "max |difference| 3", False), CheckRow("memory", "too small", None)]
    seen = []

    def verify(megatron_dir, hf_dir, *, level):
        seen.append((open_checkpoint(megatron_dir).iteration, hf_dir, level))
        return rows

    monkeypatch.setattr(import_hf, "verify_model", verify)
    assert_refused(
        folder, r"transformers computes from the folder, got logits: max \|difference\| 3. Nothing was", verify="auto"
    )
    assert seen == [(0, folder, "auto")]
    rows.pop(0)
    assert convert(folder, verify="auto").checks[-1] == CheckRow("memory", "too small", None)


def test_a_family_that_transformers_does_not_have_comes_back(folder):
    """tiny-llm-zh: Llama with biases on q, k and v. Its export is of the class that computes it, with its names."""
    weights = write_toy_folder(folder, model_type="tinyllm", architectures=["TinyllmForCausalLM"], hidden_act="silu")
    assert "model.layers.0.self_attn.k_proj.bias" in weights
    assert convert(folder).model_type == "tinyllm"
    assert_equal(weights, export(folder))
    assert json.loads((folder.with_name("again") / "config.json").read_text())["model_type"] == "qwen2"


def test_the_tokenizer_comes_along(folder, tmp_path):
    tokenizer = train_toy_tokenizer(tmp_path)
    write_toy_folder(folder, vocab_size=TOY_VOCAB_SIZE)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    report = convert(folder)
    tokenizer_dir = folder.with_name("save") / "release" / "tokenizer"
    assert report.tokenizer_dir == tokenizer_dir
    assert (tokenizer_dir / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert open_checkpoint(folder.with_name("save")).args.tokenizer_model == str(tokenizer_dir)
    assert report.checks[0].check == "tokenizer copied"
    assert "tokens equal in transformers" in report.checks[0].result


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(import_hf, "write_verified_weights", None)
    tokenizer = train_toy_tokenizer(tmp_path)
    write_toy_folder(folder)
    assert_refused(folder, "must not have more ids than the model, got .* ids, vocab_size=53", tokenizer_path=tokenizer)
    with pytest.raises(DataError, match=r"none.model: tokenizer does not exist.* Or pass --no-tokenizer."):
        convert(folder, tokenizer_path=tmp_path / "none.model")


def test_a_disk_that_is_too_small_is_reported_first(folder, monkeypatch):
    write_toy_folder(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert_refused(folder, r"disk must have 23,280 bytes free for the weights, got 1,000. Free space")


def test_a_disk_that_fills_up_is_one_sentence(folder, monkeypatch):
    write_toy_folder(folder)

    def fill_up(writer, key, offsets, tensor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CheckpointWriter, "write_chunk", fill_up)
    assert_refused(folder, r"release\.\w+\.partial: directory cannot be written \(No space left on device\)")


def test_an_earlier_import_is_replaced_only_when_asked(folder):
    write_toy_folder(folder)
    convert(folder)
    with pytest.raises(ConversionError, match=r"release: target must not exist yet. Choose another --save, or pass"):
        convert(folder)
    weights = write_toy_folder(folder, weights=draw_hf_weights(LLAMA_CONFIG, seed=9))
    convert(folder, overwrite=True)
    assert_equal(weights, export(folder))


def test_a_folder_that_would_be_replaced_by_its_own_import_is_refused(folder):
    inside = folder.with_name("save") / "release" / "hf"
    write_toy_folder(inside)
    options = ImportOptions(hf_dir=inside, save_dir=folder.with_name("save"), overwrite=True)
    with pytest.raises(OutputError, match="must not be or hold the input"):
        import_from_hugging_face(options)
    assert (inside / "config.json").is_file()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "adapter_config.json"])
def test_a_link_to_nothing_is_no_absent_file(folder, name):
    write_toy_folder(folder)
    (folder / name).symlink_to("gone")
    assert_refused(folder, rf"{name}: link must lead to a file, got gone\. Repair or remove it")


def test_other_weights_do_not_stand_in_for_a_link_to_nothing(folder):
    torch.save(write_toy_folder(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    assert_refused(folder, r"model\.safetensors: link must lead to a file, got gone")
