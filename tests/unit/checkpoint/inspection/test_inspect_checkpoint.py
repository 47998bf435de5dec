"""The description of a checkpoint agrees with what was written into it."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from megatron_hammer.checkpoint.inspection.inspect_checkpoint import describe_checkpoint, measure_tensors, select_views
from megatron_hammer.checkpoint.inspection.tables import (
    description_to_json,
    group_alike,
    print_description,
    print_statistics,
    statistics_to_json,
    summarise_description,
    summarise_statistics,
)
from megatron_hammer.checkpoint.inspection.tensor_views import open_any
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_legacy_checkpoint import legacy_arguments, llama_weights, write_legacy_checkpoint
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, toy_arguments
from tests.helpers.toy_pair import read_folder, write_toy_pair
from tests.helpers.toy_training_checkpoint import optimizer_state, training_arguments, write_training_checkpoint

LAYER = 24 + 40 * 24 + 24 * 24 + 24 + 40 * 24 + 24 * 20
TOY_PARAMETERS = 2 * 53 * 24 + 3 * LAYER + 24
TOY_PADDING = 2 * 11 * 24
ARGUMENTS = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": 3,
    "expert_model_parallel_size": 5,
    "data_parallel_size": 6,
    "world_size": 48,
    "params_dtype": torch.bfloat16,
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "tok.model",
    "data_path": ["0.3", "zh", "0.7", "en"],
}


def describe(path):
    return describe_checkpoint(open_any(path))


def printed(print_it, *arguments) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_it(*arguments, console)
    return console.file.getvalue()


def test_a_training_checkpoint_is_described(tmp_path):
    write_training_checkpoint(tmp_path, arguments=training_arguments(**ARGUMENTS))
    write_toy_checkpoint(tmp_path, toy_llama_tensors(), iteration=5)
    found = describe_checkpoint(open_any(tmp_path, iteration=10))
    parameters = 2 * 53 * 24 + 4 * LAYER + 24
    assert (found.num_parameters, found.num_padding_parameters) == (parameters, TOY_PADDING)
    assert found.num_bytes == 4 * 4 * (parameters + TOY_PADDING)
    assert (found.format, found.iteration, found.iterations) == ("torch_dist", 10, (5, 10))
    assert (found.consumed_samples, found.consumed_tokens) == (80, 80 * 16)
    assert found.layout | {"sequence parallel": False} == found.layout
    assert [found.layout[name] for name in ("tensor parallel", "pipeline parallel", "virtual stages a rank")] == [
        2,
        4,
        3,
    ]
    assert [found.layout[name] for name in ("expert parallel", "data parallel", "world size")] == [5, 6, 48]
    assert found.optimizer == {
        "state": "27 tensors of exp_avg, exp_avg_sq, param",
        "format": "distributed, fully_reshardable",
        "step": 10,
        "lr": 0.1,
        "scheduler at sample": 80,
    }
    assert found.recipe["tokenizer"] == "SentencePieceTokenizer tok.model"
    assert found.recipe["data"] == "0.3 zh 0.7 en"
    assert (found.recipe["lr"], found.recipe["global batch"], found.recipe["parameters in"]) == (1e-3, 8, "bfloat16")
    assert found.architecture["num_query_groups"] == 2
    assert len(found.objects) == 3
    assert len(found.tensors) == 4 * 9
    fc1 = next(entry for entry in found.tensors if entry.name == "decoder.layers.mlp.linear_fc1.weight")
    assert (fc1.shape, fc1.dtype, fc1.num_elements, fc1.num_chunks) == ((4, 40, 24), "float32", 3840, 4)


def test_a_chained_and_a_plain_optimizer_are_described(tmp_path):
    write_training_checkpoint(tmp_path, is_moe=True, optimizer=optimizer_state(is_chained=True), sharding=None)
    assert describe(tmp_path).optimizer["step"] == 10
    assert describe(tmp_path).optimizer["format"] == "not distributed"


def test_weights_only_and_an_unknown_vocabulary(tmp_path):
    tensors = toy_llama_tensors()
    del tensors["optimizer.state.exp_avg.output_layer.weight"]
    write_toy_checkpoint(tmp_path, tensors, arguments=toy_arguments(vocab_size=None))
    found = describe(tmp_path)
    assert found.optimizer == {"state": "none: weights only"}
    assert (found.num_parameters, found.num_padding_parameters) == (TOY_PARAMETERS + TOY_PADDING, None)


def test_a_legacy_checkpoint_is_described(tmp_path):
    arguments = legacy_arguments(tensor_model_parallel_size=2, consumed_train_samples=30)
    write_legacy_checkpoint(tmp_path, llama_weights(), tp=2, arguments=arguments)
    found = describe(tmp_path)
    assert (found.format, found.iteration, found.consumed_tokens) == ("legacy", 10, 480)
    assert found.num_parameters == 2 * 53 * 24 + 4 * LAYER + 24
    assert found.layout["tensor parallel"] == 2
    assert "decoder.layers.*.mlp.linear_fc1.weight" in printed(print_description, found)


@pytest.mark.parametrize("changes", [{}, MOE_ARGUMENTS, GPT2_ARGUMENTS], ids=["llama", "moe", "gpt2"])
def test_both_sides_have_the_same_number_of_parameters(tmp_path, changes):
    megatron_dir, hf_dir = write_toy_pair(tmp_path, changes)
    assert describe(megatron_dir).num_parameters == describe(hf_dir).num_parameters
    assert describe(hf_dir).num_parameters == sum(tensor.numel() for tensor in read_folder(hf_dir).values())


def test_an_expert_bias_is_no_parameter(tmp_path):
    tensors = toy_llama_tensors()
    write_toy_checkpoint(tmp_path / "without", tensors)
    # A checkpoint of layers with keys of their own, as one with dense layers among mixtures.
    bias = {"decoder.layers.1.mlp.router.expert_bias": torch.zeros(5)}
    write_toy_checkpoint(tmp_path / "with", tensors | bias)
    before, after = (describe(tmp_path / name) for name in ("without", "with"))
    assert after.num_parameters == before.num_parameters
    assert after.num_bytes == before.num_bytes + 4 * 5


def test_a_tied_head_and_buffers_are_no_parameters(tmp_path):
    _, hf_dir = write_toy_pair(tmp_path, {"untie_embeddings_and_output_weights": False})
    before = describe(hf_dir).num_parameters
    weights = read_folder(hf_dir)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(weights, hf_dir / "model.safetensors")
    found = describe(hf_dir)
    assert found.num_parameters == before
    assert len(found.tensors) == len(weights)


def test_a_model_that_cannot_be_converted_is_still_listed(tmp_path):
    write_toy_checkpoint(tmp_path / "megatron", toy_llama_tensors(), arguments=toy_arguments(qk_l2_norm=True))
    found = describe(tmp_path / "megatron")
    assert found.num_parameters == TOY_PARAMETERS
    assert found.notes[0].startswith("no conversion: qk_l2_norm: cannot be exported, got qk_l2_norm=True")
    assert found.notes[0] in printed(print_description, found).replace("\n", "")
    _, hf_dir = write_toy_pair(tmp_path / "pair", {})
    (hf_dir / "config.json").write_text('{"model_type": "gemma3", "width": 24}')
    found = describe(hf_dir)
    assert found.num_parameters == TOY_PARAMETERS
    assert found.architecture == {"model_type": "gemma3", "width": 24}
    assert "got model_type='gemma3'" in found.notes[0]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_every_damaged_file_is_named(tmp_path):
    write_training_checkpoint(tmp_path)
    directory = tmp_path / "iter_0000010"
    files = sorted(directory.glob("*.distcp"))
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path)
    assert len(caught.value.problems) == len(files)
    for path, problem in zip(files, caught.value.problems, strict=True):
        assert problem.startswith(f"{path}: must hold at least ")
        assert "got 1000 bytes." in problem
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: file must be readable, got No such file or directory\."):
        describe(tmp_path)


def test_a_folder_without_its_weights_is_refused(tmp_path):
    _, hf_dir = write_toy_pair(tmp_path, {})
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"hf: must hold model\.safetensors or pytorch_model\.bin"):
        describe(hf_dir)


def test_a_folder_has_neither_iterations_nor_master_weights(tmp_path):
    _, hf_dir = write_toy_pair(tmp_path, {})
    message = r"hf: a Hugging Face folder has one set of weights, got iteration=3, weights=model\. Leave both out\.$"
    with pytest.raises(CheckpointError, match=message):
        open_any(hf_dir, iteration=3)


# --- output ----------------------------------------------------------------------------------------------------------


def test_names_that_differ_in_numbers_are_one_line(tmp_path):
    write_training_checkpoint(tmp_path / "dist")
    groups = dict(group_alike(describe(tmp_path / "dist").tensors))
    assert next(iter(groups)) == "embedding.word_embeddings.weight"
    assert list(groups)[-3:] == ["optimizer.state.param.*", "optimizer.state.exp_avg.*", "optimizer.state.exp_avg_sq.*"]
    assert all(len(groups[name]) == 9 for name in list(groups)[-3:])
    _, hf_dir = write_toy_pair(tmp_path, MOE_ARGUMENTS)
    groups = dict(group_alike(describe(hf_dir).tensors))
    assert len(groups["model.layers.*.mlp.experts.*.up_proj.weight"]) == 3 * 5
    assert len(groups["model.norm.weight"]) == 1


def test_tables_and_json_say_the_same(tmp_path):
    write_training_checkpoint(tmp_path)
    found = describe(tmp_path)
    text = printed(print_description, found)
    for part in ("distributed, fully_reshardable", "1,280", f"{found.num_parameters:,}", "1 _extra_state, 1 rerun"):
        assert part in text
    values = json.loads(json.dumps(description_to_json(found), allow_nan=False))
    assert values["num_parameters"] == found.num_parameters
    assert values["tensors"][0]["shape"] == [64, 24]
    assert summarise_description(found) == (
        f"{tmp_path}/iter_0000010: torch_dist, iteration 10, 1,280 tokens, {found.num_parameters:,} parameters, "
        f"36 tensors, {found.num_bytes:,} bytes"
    )


def test_statistics_find_the_layer_with_nan(tmp_path):
    tensors = toy_llama_tensors()
    tensors["decoder.layers.mlp.linear_fc2.weight"][1, 4, 7] = float("nan")
    write_toy_checkpoint(tmp_path, tensors)
    measured = measure_tensors(select_views(open_any(tmp_path), ()))
    assert len(measured) == 21
    assert [name for name, found in measured.items() if found.num_nan] == ["decoder.layers.1.mlp.linear_fc2.weight"]
    norm = tensors["decoder.final_layernorm.weight"]
    assert measured["decoder.final_layernorm.weight"].max == norm.max().item()
    assert summarise_statistics(measured).endswith(", 1 with NaN or infinity (decoder.layers.1.mlp.linear_fc2.weight)")
    assert "decoder.layers.1.mlp.linear_fc2.weight" in printed(print_statistics, measured)
    mean = statistics_to_json(measured)["output_layer.weight"]["mean"]
    assert mean == pytest.approx(tensors["output_layer.weight"].double().mean().item(), rel=1e-9)


def test_names_choose_tensors_the_optimizers_too(tmp_path):
    write_toy_checkpoint(tmp_path, toy_llama_tensors())
    opened = open_any(tmp_path)
    assert set(select_views(opened, ("*.2.*layer_norm*", "*exp_avg*"))) == {
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
        "optimizer.state.exp_avg.output_layer.weight",
    }
    with pytest.raises(
        CheckpointError, match=r"iter_0000010: a tensor must match --names, got none for qkv among 22 names\."
    ):
        select_views(opened, ("qkv",))
