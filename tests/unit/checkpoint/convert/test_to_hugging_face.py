"""A checkpoint becomes a folder that transformers loads; whatever goes wrong leaves nothing behind."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hammer.checkpoint.convert import row_blocks as row_copy
from megatron_hammer.checkpoint.convert import to_hugging_face as export
from megatron_hammer.checkpoint.convert import weight_export
from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_layouts import GATE_UP, split_qkv
from megatron_hammer.checkpoint.verification.verify_conversion import CheckRow
from megatron_hammer.checkpoint_files.safetensors import shard_writer as safetensors_stream
from megatron_hammer.errors import CheckpointError, ConversionError, OutputError
from megatron_hammer.tokenizer.encoding import encoder
from megatron_hammer.tokenizer.encoding.encoder import load_encoder
from megatron_hammer.tokenizer.export import check_loading, export_tokenizer
from megatron_hammer.tokenizer.export.chat_format import ChatFormat
from tests.helpers.messages import assert_problems
from tests.helpers.sentencepiece_models import MODEL_OPTIONS, train_model
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, toy_arguments
from tests.helpers.toy_tokenizer import LLAMA_ADDED_TOKENS, TOY_VOCAB_SIZE, train_toy_tokenizer, write_llama_folder


def export_options(**changes) -> ExportOptions:
    """Without the comparison of both models, which starts two processes; tests/integration has it."""
    return ExportOptions(**({"verify": "tensors"} | changes))


@pytest.fixture
def options(tmp_path):
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors())
    return export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")


def assert_nothing_was_left(options: ExportOptions) -> None:
    assert [entry.name for entry in options.save_dir.parent.iterdir() if entry.name.startswith("hf")] == []


def test_llama_becomes_a_complete_folder(options):
    report = export_to_hugging_face(options)
    names = {path.name for path in options.save_dir.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    weights, source = load_file(options.save_dir / "model.safetensors"), toy_llama_tensors()
    qkv = source["decoder.layers.self_attention.linear_qkv.weight"][1]
    query, key, value = split_qkv(qkv, num_query_groups=2, head_dim=4)
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.weight"], query)
    assert torch.equal(weights["model.layers.1.self_attn.k_proj.weight"], key)
    assert torch.equal(weights["model.layers.1.self_attn.v_proj.weight"], value)
    assert torch.equal(weights["lm_head.weight"], source["output_layer.weight"][:53])
    assert report.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert (report.num_megatron_tensors, report.num_hf_tensors, report.iteration) == (21, 30, 10)
    assert_problems(report.notes, ("no tokenizer was written", "checkpoint names none", "--tokenizer-model"))


def test_the_model_card_says_what_and_how(options):
    export_to_hugging_face(options)
    card = (options.save_dir / "README.md").read_text()
    for line in ("# toy", "iteration 10", "| vocabulary | 53 |", "| tokens | 1,280 |", "has no tokenizer"):
        assert line in card


def test_the_card_of_a_converted_checkpoint_says_where_it_comes_from(tmp_path):
    arguments = toy_arguments(imported_from="/models/Tiny-3")
    for name in ("lr", "min_lr", "seed", "weight_decay", "adam_beta1", "clip_grad", "global_batch_size", "seq_length"):
        delattr(arguments, name)
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors(), arguments=arguments, iteration=0)
    export_to_hugging_face(export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Converted by megatron_hammer from Tiny-3, not trained further." in card
    assert "| steps |" not in card
    write_toy_checkpoint(tmp_path / "trained", toy_llama_tensors(), arguments=arguments, iteration=7)
    export_to_hugging_face(export_options(load_dir=tmp_path / "trained", save_dir=tmp_path / "hf2"))
    card = (tmp_path / "hf2" / "README.md").read_text()
    assert "| steps | 7 |" in card
    assert "learning rate" not in card


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_the_norms_of_apply_layernorm_1p_get_their_1(dtype, tmp_path):
    """Under the names that megatron-core had until 0.15."""
    tensors = toy_llama_tensors(dtype=torch.bfloat16)
    arguments = toy_arguments(norm_epsilon=1e-6, apply_layernorm_1p=True)
    del arguments.layernorm_epsilon
    write_toy_checkpoint(tmp_path / "checkpoint", tensors, arguments=arguments)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf", dtype=dtype)
    report = export_to_hugging_face(options)
    weights = load_file(options.save_dir / "model.safetensors")
    written = torch.float32 if dtype else torch.bfloat16
    expected = (tensors["decoder.final_layernorm.weight"].float() + 1).to(written)
    assert torch.equal(weights["model.norm.weight"], expected)
    first = (tensors["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][0].float() + 1).to(written)
    assert torch.equal(weights["model.layers.0.input_layernorm.weight"], first)
    assert torch.equal(weights["lm_head.weight"], tensors["output_layer.weight"][:53].to(written))
    assert json.loads((options.save_dir / "config.json").read_text())["rms_norm_eps"] == 1e-6
    assert any("rounded to bfloat16" in note for note in report.notes) == (dtype is None)


def test_an_unknown_argument_is_exported_only_where_it_is_ignored(tmp_path):
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors(), arguments=toy_arguments(logit_cap=30.0))
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"^logit_cap: .*got logit_cap=30\.0.*--ignore-arguments logit_cap"):
        export_to_hugging_face(options)
    export_to_hugging_face(dataclasses.replace(options, ignored_arguments=("logit_cap",)))


@pytest.mark.parametrize("is_cut_by_rows", [True, False], ids=["copied by rows", "assembled"])
def test_a_flipped_bit_of_a_weight_stops_the_export(is_cut_by_rows, tmp_path):
    """The number stays finite, so only the checksum beside it can tell."""
    tensors = toy_llama_tensors()
    target = write_toy_checkpoint(tmp_path / "checkpoint", tensors, is_cut_by_rows=is_cut_by_rows)
    marked = tensors["decoder.layers.mlp.linear_fc2.weight"][1, 3, -2:].numpy().tobytes()
    path = next(path for path in target.glob("*.distcp") if marked in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(marked)] ^= 1
    path.write_bytes(content)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")
    with pytest.raises(CheckpointError, match=rf"{path.name}: decoder.layers.mlp.linear_fc2.weight must .* CRC32"):
        export_to_hugging_face(options)
    assert_nothing_was_left(options)


FAMILIES = {
    "llama": {},
    "llama with biases": {"add_bias_linear": True},
    "llama tied": {"untie_embeddings_and_output_weights": False},
    "qwen2": {"add_qkv_bias": True},
    "qwen2 moe": MOE_ARGUMENTS | {"add_qkv_bias": True},
    "gpt2": GPT2_ARGUMENTS,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_every_family_without_a_missing_tensor(name, tmp_path):
    arguments = toy_arguments(**FAMILIES[name])
    model = read_saved_model(arguments)
    pairs = expand(select_family(model), model)
    tensors = {pair.megatron_name: torch.randn(pair.megatron_shape) for pair in pairs}
    write_toy_checkpoint(tmp_path / "checkpoint", tensors, arguments=arguments)
    export_to_hugging_face(export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(loaded).__name__ == select_family(model).hf_class
    assert not any(info.values()), info
    assert loaded(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "stored, requested, written",
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.float32, "fp16", torch.float16),
    ],
)
def test_the_dtype_is_the_stored_or_the_requested_one(tmp_path, stored, requested, written):
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors(dtype=stored))
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf", dtype=requested)
    export_to_hugging_face(options)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {written}
    expected = toy_llama_tensors(dtype=stored)["decoder.final_layernorm.weight"].to(written)
    assert torch.equal(weights["model.norm.weight"], expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == written


@pytest.mark.parametrize(
    ("second", "written"), [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, None)]
)
def test_several_stored_dtypes_become_the_one_that_holds_all_and_a_note_says_so(tmp_path, second, written):
    """fp16 has neither the range of bf16 nor is bf16 as precise."""
    tensors = toy_llama_tensors(dtype=torch.bfloat16)
    name = "decoder.final_layernorm.weight"
    tensors[name] = tensors[name].to(second)
    write_toy_checkpoint(tmp_path / "checkpoint", tensors)
    report = export_to_hugging_face(export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf"))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {written or torch.bfloat16}
    notes = [note for note in report.notes if note.startswith("weights are stored in bfloat16 and ")]
    assert len(notes) == (0 if written is None else 1)


def test_chunks_and_shards_do_not_change_the_weights(options, tmp_path):
    export_to_hugging_face(options)
    one_file = load_file(options.save_dir / "model.safetensors")
    write_toy_checkpoint(tmp_path / "other", toy_llama_tensors(), num_chunks=3)
    other = export_options(load_dir=tmp_path / "other", save_dir=tmp_path / "hf2", max_shard_bytes=20_000)
    assert export_to_hugging_face(other).num_shards > 2
    index = json.loads((tmp_path / "hf2" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == one_file.keys()
    for name, file_name in index.items():
        assert (tmp_path / "hf2" / file_name).stat().st_size < 25_000
        assert torch.equal(load_file(tmp_path / "hf2" / file_name)[name], one_file[name])


def test_missing_unexpected_and_misshapen_tensors_are_named_at_once(tmp_path):
    tensors = toy_llama_tensors()
    del tensors["decoder.final_layernorm.weight"]
    tensors["decoder.layers.mlp.linear_fc1.bias"] = torch.ones(3, 40)
    tensors["output_layer.weight"] = torch.ones(50, 24)
    write_toy_checkpoint(tmp_path / "checkpoint", tensors)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")
    with pytest.raises(ConversionError) as caught:
        export_to_hugging_face(options)
    assert len(caught.value.problems) == 1 + 3 + 1
    assert "output_layer.weight: expected shape (53, 24), got (50, 24)" in str(caught.value)
    assert_nothing_was_left(options)


@pytest.mark.parametrize("is_cut_by_rows", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value, is_cut_by_rows):
    tensors = toy_llama_tensors()
    tensors["decoder.layers.mlp.linear_fc2.weight"][1, 2, 3] = value
    write_toy_checkpoint(tmp_path / "checkpoint", tensors, is_cut_by_rows=is_cut_by_rows)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"decoder.layers.1.mlp.linear_fc2.weight: weights must be finite"):
        export_to_hugging_face(options)
    assert_nothing_was_left(options)


def test_master_weights_are_exported_in_fp32_or_as_asked(tmp_path):
    masters = {key: value for key, value in toy_llama_tensors().items() if not key.startswith("optimizer.")}
    tensors = {key: value.bfloat16() for key, value in masters.items()}
    tensors |= {f"optimizer.state.param.{key}": value for key, value in masters.items()}
    write_toy_checkpoint(tmp_path / "checkpoint", tensors)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf", weights="master")
    assert export_to_hugging_face(options).dtype == "float32"
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], masters["output_layer.weight"][:53])
    rounded = dataclasses.replace(options, save_dir=tmp_path / "rounded", dtype="bf16")
    plain = dataclasses.replace(options, save_dir=tmp_path / "plain", weights="model")
    assert export_to_hugging_face(rounded).dtype == export_to_hugging_face(plain).dtype == "bfloat16"
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "plain")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(options, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConversionError, match=r"hf: disk must have 46,560 bytes free for the weights, got 1,000\b"):
        export_to_hugging_face(options)
    assert_nothing_was_left(options)


@pytest.fixture(params=[False, True], ids=["whole", "by-rows"])
def cut_options(tmp_path, request):
    """Tensors that are moved whole, and tensors that are moved row by row."""
    write_toy_checkpoint(tmp_path / "checkpoint", toy_llama_tensors(), is_cut_by_rows=request.param)
    return export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")


def test_rows_moved_alone_are_the_same_bytes(options, tmp_path, monkeypatch):
    export_to_hugging_face(options)
    write_toy_checkpoint(tmp_path / "rows", toy_llama_tensors(), num_chunks=3, is_cut_by_rows=True)
    monkeypatch.delattr(weight_export, "_write_whole")  # nothing needs it
    for block_bytes in (1 << 19, 40):  # a row of fp32 has 80 or 96 bytes
        monkeypatch.setattr(row_copy, "BLOCK_BYTES", block_bytes)
        export_to_hugging_face(
            dataclasses.replace(options, load_dir=tmp_path / "rows", save_dir=tmp_path / "hf2", overwrite=True)
        )
        name = "model.safetensors"
        assert (tmp_path / "hf2" / name).read_bytes() == (options.save_dir / name).read_bytes()


def test_a_bit_that_changes_on_disk_is_noticed(cut_options, monkeypatch):
    """The file is written right, then damaged before it is read back."""
    write = safetensors_stream.write_at
    damaged = toy_llama_tensors()["decoder.layers.mlp.linear_fc2.weight"][2].flatten()[:5]

    def write_and_damage(file, start, tensor):
        write(file, start, tensor)
        if torch.equal(tensor.flatten()[:5], damaged):
            os.pwrite(file.fileno(), b"\xa5", start + 7)

    monkeypatch.setattr(row_copy, "write_at", write_and_damage)
    monkeypatch.setattr(safetensors_stream, "write_at", write_and_damage)
    with pytest.raises(
        ConversionError, match=r"decoder.layers.2.mlp.linear_fc2.weight: what was written must read back"
    ):
        export_to_hugging_face(cut_options)
    assert_nothing_was_left(cut_options)


def test_large_tensors_are_proved_one_at_a_time(options, monkeypatch):
    export_to_hugging_face(options)
    shared = (options.save_dir / "model.safetensors").read_bytes()
    monkeypatch.setattr(weight_export, "_MAX_SHARED_BYTES", 2000)  # of both kinds, by turns
    export_to_hugging_face(dataclasses.replace(options, overwrite=True))
    assert (options.save_dir / "model.safetensors").read_bytes() == shared


def test_weights_beyond_the_requested_dtype_are_named(tmp_path):
    tensors = toy_llama_tensors()
    tensors["output_layer.weight"][0, 0] = 1e6
    write_toy_checkpoint(tmp_path / "checkpoint", tensors)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf", dtype="fp16")
    with pytest.raises(ConversionError, match=r"output_layer.weight: weights must be finite in float16\b"):
        export_to_hugging_face(options)


def test_twin_a_wrong_split_does_not_pass_the_verification(cut_options, monkeypatch):
    wrong = dataclasses.replace(GATE_UP, split=lambda tensor, _: tuple(reversed(tensor.chunk(2))))
    whole_expand = export.expand
    monkeypatch.setattr(
        export,
        "expand",
        lambda family, model: [
            dataclasses.replace(pair, layout=wrong if pair.layout is GATE_UP else pair.layout)
            for pair in whole_expand(family, model)
        ],
    )
    with pytest.raises(ConversionError, match="what was written must read back equal") as caught:
        export_to_hugging_face(cut_options)
    assert len(caught.value.problems) == 3  # one a layer
    assert_nothing_was_left(cut_options)


def test_the_models_are_compared_on_links_so_that_the_partial_folder_never_loads(options, monkeypatch):
    calls = []

    def compare(megatron_dir, hf_dir, **settings):
        (partial,) = options.save_dir.parent.glob("hf.*.partial")
        assert not (partial / "config.json").exists()
        assert transformers.AutoModelForCausalLM.from_pretrained(hf_dir).config.vocab_size == 53
        calls.append((megatron_dir, settings))
        return [CheckRow("logits", "equal", True), CheckRow("layers", "not needed", None)]

    monkeypatch.setattr(export, "verify_model", compare)
    report = export_to_hugging_face(dataclasses.replace(options, verify="auto", iteration=10, weights="master"))
    assert calls == [(options.load_dir, {"level": "auto", "iteration": 10, "weights": "master"})]
    assert [(row.check, row.is_passed) for row in report.checks] == [
        ("tensors", True),
        ("tokenizer", None),
        ("logits", True),
        ("layers", None),
    ]
    assert transformers.AutoModelForCausalLM.from_pretrained(options.save_dir).config.vocab_size == 53


def test_a_comparison_that_fails_leaves_nothing_and_names_each_failed_row(options, monkeypatch):
    rows = [CheckRow("logits", "off by 3", False), CheckRow("tokens", "equal", True), CheckRow("loss", "nan", False)]
    monkeypatch.setattr(export, "verify_model", lambda *args, **kwargs: rows)
    message = "checkpoint: transformers must compute what Megatron does, got logits: off by 3. Nothing was written;"
    with pytest.raises(ConversionError, match=message) as caught:
        export_to_hugging_face(dataclasses.replace(options, verify="logits"))
    assert len(caught.value.problems) == 2
    assert_nothing_was_left(options)


def test_an_interruption_leaves_nothing(options):
    def interrupt(current: str, done: int, total: int) -> None:
        if current == "tensors" and done > total // 2:
            (partial,) = options.save_dir.parent.glob("hf.*.partial")
            assert not (partial / "config.json").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_to_hugging_face(options, interrupt)
    assert_nothing_was_left(options)


def test_leftovers_of_a_killed_export_are_replaced(options):
    partial = Path(f"{options.save_dir}.0123456789abcdef.partial")
    partial.mkdir()
    (partial / "model-00007-of-00009.safetensors").write_bytes(b"half")
    export_to_hugging_face(options)
    assert not partial.exists()
    assert not list(options.save_dir.glob("model-*"))


def test_an_existing_target_is_replaced_only_when_asked_and_only_an_export(options):
    export_to_hugging_face(options)
    with pytest.raises(ConversionError, match="hf: target must not exist yet"):
        export_to_hugging_face(options)
    again = dataclasses.replace(options, overwrite=True, dtype="bf16")
    assert export_to_hugging_face(again).dtype == "bfloat16"
    (options.save_dir / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"--overwrite replaces an earlier result only, got notes\.txt in it too"):
        export_to_hugging_face(again)
    (options.save_dir / "notes.txt").unlink()
    # A model of somebody else, as the one that training began with.
    (options.save_dir / "README.md").write_text("# A model\n")
    with pytest.raises(OutputError, match=r"got no README\.md of this tool"):
        export_to_hugging_face(again)
    assert (options.save_dir / "model.safetensors").is_file()
    # A folder that holds the checkpoint too.
    with pytest.raises(OutputError, match="--overwrite replaces an earlier result only"):
        export_to_hugging_face(dataclasses.replace(again, save_dir=options.load_dir.parent))
    assert list(options.load_dir.iterdir())


def test_the_target_of_a_failed_replacement_stays(options):
    export_to_hugging_face(options)
    before = (options.save_dir / "model.safetensors").read_bytes()
    again = dataclasses.replace(options, overwrite=True, load_dir=options.load_dir / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_to_hugging_face(again)
    assert (options.save_dir / "model.safetensors").read_bytes() == before


def test_a_target_that_cannot_be_made_is_refused(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="directory cannot be made"):
        export_to_hugging_face(dataclasses.replace(options, save_dir=tmp_path / "file" / "hf"))


@pytest.fixture
def tokenizer_path(tmp_path):
    return train_toy_tokenizer(tmp_path)


def write_with_vocabulary(folder: Path, vocab_size: int, **arguments) -> ExportOptions:
    tensors = toy_llama_tensors()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.randn(vocab_size + 5, 24)
    write_toy_checkpoint(folder, tensors, arguments=toy_arguments(vocab_size=vocab_size, **arguments))
    return export_options(load_dir=folder, save_dir=folder.with_name("hf"))


def test_the_tokenizer_that_the_checkpoint_names_comes_along(tmp_path, tokenizer_path):
    options = write_with_vocabulary(tmp_path / "checkpoint", TOY_VOCAB_SIZE, tokenizer_model=str(tokenizer_path))
    report = export_to_hugging_face(options)
    assert report.notes == ()
    assert report.num_checked_texts > 90
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.save_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.save_dir)
    assert len(tokenizer) == TOY_VOCAB_SIZE == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert "AutoTokenizer" in (options.save_dir / "README.md").read_text()


def test_a_chat_template_comes_last_and_generation_stops_at_its_ends(tmp_path):
    """The tokenizer is compared with the original before, because the folder then differs from it on purpose."""
    _, options = write_llama_checkpoint(tmp_path)
    asked, checked = [], []

    def find_chat(path, args):
        asked.append((str(path), args.tokenizer_model))
        check = lambda folder: checked.append((folder / "chat_template.jinja").read_text()) or 5  # noqa: E731
        return ChatFormat(template="{{ messages }}", end_of_turn_ids=(7, 3), check=check)

    report = export_to_hugging_face(dataclasses.replace(options, find_chat=find_chat))
    assert asked == [(str(tmp_path / "llama"),) * 2]
    assert checked == ["{{ messages }}"]
    assert report.checks[-1] == CheckRow(
        "chat template", "5 conversations have the same ids and masks in transformers", True
    )
    generation = json.loads((options.save_dir / "generation_config.json").read_bytes())
    own_end = transformers.AutoTokenizer.from_pretrained(options.save_dir).eos_token_id
    assert generation["eos_token_id"] == sorted({3, 7, own_end})


def write_llama_checkpoint(tmp_path) -> tuple[Path, ExportOptions]:
    model_path = train_model(tmp_path / "tokenizer.model", **MODEL_OPTIONS["dummy prefix"])
    num_pieces = load_encoder(model_path).vocab_size
    folder = write_llama_folder(tmp_path / "llama", model_path, num_pieces)
    vocab_size = num_pieces + len(LLAMA_ADDED_TOKENS)
    return folder, write_with_vocabulary(tmp_path / "checkpoint", vocab_size, tokenizer_model=str(folder))


def test_a_tokenizer_folder_without_tokenizer_json_comes_along_whole(tmp_path):
    folder, options = write_llama_checkpoint(tmp_path)
    report = export_to_hugging_face(options)
    row = next(row for row in report.checks if row.check == "tokenizer in transformers")
    assert "facts equal the original's" in row.result
    assert row.is_passed
    source, exported = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, options.save_dir))
    assert exported("the fox<|im_end|>")["input_ids"] == source("the fox<|im_end|>")["input_ids"]
    assert (exported.pad_token, exported.chat_template) == (source.pad_token, source.chat_template)


def test_a_tokenizer_whose_class_follows_from_another_model_type_loads_alike(tmp_path):
    """Mistral comes back as llama, for which transformers would put a space before every text."""
    folder, options = write_llama_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    export_to_hugging_face(options)
    source, exported = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, options.save_dir))
    assert type(source).__name__ != "LlamaTokenizer"
    for text in ("the fox", "<|im_end|> a  <tool>b ", " x"):
        assert exported(text)["input_ids"] == source(text)["input_ids"]
        assert exported.decode(source(text)["input_ids"]) == source.decode(source(text)["input_ids"])
    assert exported.padding_side == source.padding_side


@pytest.mark.parametrize(
    "lost, fact",
    [("add_bos_token", "ids of texts"), ("chat_template", "chat template"), ("model_max_length", "model_max_length")],
)
def test_twin_a_tokenizer_that_loses_something_is_refused(tmp_path, monkeypatch, lost, fact):
    _, options = write_llama_checkpoint(tmp_path)
    complete = export_tokenizer.export_tokenizer

    def export_incompletely(source, target_dir, **settings):
        exported = complete(source, target_dir, **settings)
        path = target_dir / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {lost: None}))
        return exported

    monkeypatch.setattr(export_tokenizer, "export_tokenizer", export_incompletely)
    monkeypatch.setattr(check_loading, "pin_tokenizer", lambda source, target_dir: None)
    with pytest.raises(ConversionError, match=f"{fact} must be that of "):
        export_to_hugging_face(options)
    assert_nothing_was_left(options)


def test_a_tokenizer_that_moved_must_be_named_or_left_out(tmp_path, tokenizer_path):
    options = write_with_vocabulary(tmp_path / "checkpoint", TOY_VOCAB_SIZE, tokenizer_model="/moved/away.model")
    with pytest.raises(ConversionError, match=r"/moved/away.model: tokenizer that the checkpoint was trained with"):
        export_to_hugging_face(options)
    assert_nothing_was_left(options)
    report = export_to_hugging_face(dataclasses.replace(options, has_tokenizer=False))
    assert report.notes == ("no tokenizer was written: --no-tokenizer",)
    again = dataclasses.replace(options, tokenizer_path=tokenizer_path, overwrite=True)
    assert export_to_hugging_face(again).notes == ()


def test_a_converted_checkpoint_that_moved_has_its_tokenizer_beside_it(tmp_path, tokenizer_path):
    options = write_with_vocabulary(tmp_path / "checkpoint", TOY_VOCAB_SIZE, tokenizer_model="/moved/away/tokenizer")
    (tmp_path / "checkpoint" / "tokenizer").mkdir()
    tokenizer_path.rename(tmp_path / "checkpoint" / "tokenizer" / "tokenizer.model")
    for load_dir in (options.load_dir, options.load_dir / "iter_0000010"):
        again = dataclasses.replace(options, load_dir=load_dir, overwrite=True)
        assert export_to_hugging_face(again).num_checked_texts > 90


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, tokenizer_path):
    options = write_with_vocabulary(tmp_path / "checkpoint", TOY_VOCAB_SIZE - 1)
    with pytest.raises(ConversionError, match=f"got {TOY_VOCAB_SIZE} ids, vocab_size={TOY_VOCAB_SIZE - 1}"):
        export_to_hugging_face(dataclasses.replace(options, tokenizer_path=tokenizer_path))
    assert_nothing_was_left(options)


def test_an_unsupported_dtype_is_named(tmp_path):
    tensors = toy_llama_tensors()
    tensors["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].double()
    write_toy_checkpoint(tmp_path / "checkpoint", tensors)
    options = export_options(load_dir=tmp_path / "checkpoint", save_dir=tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"weights must be bf16, fp16 or fp32, got torch.float64\b"):
        export_to_hugging_face(options)


# --- the vocabulary of Megatron-LM's own loop ------------------------------------------------------------------------


def write_megatrons_own(directory: Path, **changes) -> ExportOptions:
    """A checkpoint whose arguments have no name of this package; 64 rows are stored."""
    arguments = toy_arguments(**{"vocab_size": None, "padded_vocab_size": 64} | changes)
    del arguments.embedding_norm, arguments.preset
    write_toy_checkpoint(directory, toy_llama_tensors(), arguments=arguments)
    return export_options(load_dir=directory, save_dir=directory.with_name("hf"))


def count_exported_rows(options: ExportOptions) -> int:
    return len(load_file(options.save_dir / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    ("arguments", "asked", "rows", "notes"),
    [
        ({}, None, 64, ["all 64 rows of the embedding are exported as tokens, though some may be padding"]),
        ({}, 60, 60, []),
        ({"vocab_size": 53}, None, 53, ["rows 53 to 63 of the embedding were judged .* vocab_size is 53; .* 64$"]),
        # until core 0.17
        ({"vocab_size": 53, "tokenizer_type": "NullTokenizer"}, None, 54, ["rows 54 to 63 .* NullTokenizer adds its"]),
        (
            {"vocab_size": 53, "tokenizer_type": "NullTokenizer", "null_tokenizer_eod_id": None},
            None,
            53,
            ["rows 53 to"],
        ),
    ],
)
def test_rows_judged_to_be_padding_are_named(arguments, asked, rows, notes, tmp_path):
    options = dataclasses.replace(write_megatrons_own(tmp_path / "checkpoint", **arguments), vocab_size=asked)
    report = export_to_hugging_face(options)
    assert count_exported_rows(options) == rows
    found = [note for note in report.notes if "rows" in note]
    assert len(found) == len(notes)
    assert all(re.search(pattern, note) for pattern, note in zip(notes, found, strict=True))


@pytest.mark.parametrize(("saved", "rows"), [(None, 57), (50, 57), (61, 61)])
def test_the_tokenizer_says_how_many_tokens_there_are(saved, rows, tmp_path, monkeypatch):
    """50: without the end of document. 61: the model has more rows than the tokenizer has ids, as Qwen's has."""
    monkeypatch.setattr(encoder, "load_encoder", lambda path: SimpleNamespace(vocab_size=57))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    options = write_megatrons_own(
        tmp_path / "checkpoint", tokenizer_model=str(tmp_path / "tokenizer.model"), vocab_size=saved
    )
    options = dataclasses.replace(options, has_tokenizer=False)  # without its files; it still has a number of ids
    report = export_to_hugging_face(options)
    assert count_exported_rows(options) == rows
    reason = "tokenizer.model has 57 ids" if rows == 57 else "vocab_size is 61"
    assert any(f"rows {rows} to 63" in note and reason in note for note in report.notes)
