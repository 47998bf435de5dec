"""Two checkpoints differ in exactly what was changed, whichever kinds they are of."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_hammer.checkpoint.inspection import comparison as checkpoint_comparison
from megatron_hammer.checkpoint.inspection.comparison import compare_checkpoints, count_differences
from megatron_hammer.checkpoint.inspection.tensor_views import open_any
from megatron_hammer.errors import CheckpointError, ConversionError
from tests.helpers.toy_checkpoint import toy_llama_tensors, write_toy_checkpoint
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, toy_arguments
from tests.helpers.toy_pair import read_folder, write_toy_pair

QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


def compare(first, second, **options):
    return compare_checkpoints(open_any(first), open_any(second), **options)


def kinds(found) -> dict[str, str]:
    return {difference.name: difference.kind for difference in found.differences}


# --- Megatron with Megatron ------------------------------------------------------------------------------------------


def test_chunks_and_padding_are_no_difference(tmp_path):
    tensors = toy_llama_tensors()
    write_toy_checkpoint(tmp_path / "first", tensors, num_chunks=2)
    wider = {name: torch.cat([tensors[name][:53], torch.full((20, 24), 7.0)]) for name in (EMBEDDING, HEAD)}
    arguments = toy_arguments(tensor_model_parallel_size=4, padded_vocab_size=73)
    write_toy_checkpoint(tmp_path / "second", tensors | wider, num_chunks=3, arguments=arguments)
    found = compare(tmp_path / "first", tmp_path / "second")
    assert found.is_equal
    assert (found.num_compared, found.num_equal) == (21, 21)
    assert [(one.name, one.first, one.second) for one in found.arguments] == [
        ("padded_vocab_size", "64", "73"),
        ("tensor_model_parallel_size", "absent", "4"),
    ]


def test_every_kind_of_difference_is_found(tmp_path):
    tensors = toy_llama_tensors()
    write_toy_checkpoint(tmp_path / "first", tensors)
    changed = dict(tensors)
    changed[QKV] = tensors[QKV].clone()
    changed[QKV][1, 3, 5] += 0.5
    changed[QKV][1, 9, 2] -= 2.0
    changed[HEAD] = tensors[HEAD].clone()
    changed[HEAD][52, 0] = float("nan")  # the last row before the padding
    changed["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].to(torch.bfloat16)
    changed[EMBEDDING] = tensors[EMBEDDING][:, :20]
    del changed["decoder.layers.mlp.linear_fc2.weight"]
    changed["decoder.layers.mlp.linear_fc2.bias"] = torch.zeros(3, 24)
    write_toy_checkpoint(tmp_path / "second", changed, iteration=20)
    found = compare(tmp_path / "first", tmp_path / "second")
    by_name = {difference.name: difference for difference in found.differences}
    assert kinds(found) == {
        "decoder.layers.1.self_attention.linear_qkv.weight": "value",
        HEAD: "value",
        "decoder.final_layernorm.weight": "dtype",
        EMBEDDING: "shape",
        **{f"decoder.layers.{layer}.mlp.linear_fc2.weight": "missing" for layer in range(3)},
        **{f"decoder.layers.{layer}.mlp.linear_fc2.bias": "unexpected" for layer in range(3)},
    }
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert (qkv.max_difference, qkv.num_different, qkv.num_elements) == (pytest.approx(2.0), 2, 960)
    assert str(by_name[HEAD].max_difference) == "nan"
    assert (by_name[EMBEDDING].first, by_name[EMBEDDING].second) == ("(53, 24) float32", "(53, 20) float32")
    assert 0 < by_name["decoder.final_layernorm.weight"].max_difference < 0.02
    assert (found.num_compared, found.num_equal) == (17, 14)
    assert [one.name for one in found.arguments] == ["iteration"]


def test_a_dtype_can_be_ignored(tmp_path):
    write_toy_checkpoint(tmp_path / "first", toy_llama_tensors())
    write_toy_checkpoint(tmp_path / "second", toy_llama_tensors(dtype=torch.bfloat16))
    assert set(kinds(compare(tmp_path / "first", tmp_path / "second")).values()) == {"dtype"}
    assert compare(tmp_path / "first", tmp_path / "second", ignores_dtype=True).is_equal
    write_toy_checkpoint(tmp_path / "third", toy_llama_tensors(dtype=torch.bfloat16, seed=2))
    assert set(kinds(compare(tmp_path / "first", tmp_path / "third", ignores_dtype=True)).values()) == {"value"}


def test_the_optimizer_is_compared_on_request(tmp_path):
    tensors = toy_llama_tensors()
    moment = "optimizer.state.exp_avg.output_layer.weight"
    changed = tensors | {moment: tensors[moment].clone()}
    changed[moment][60] = 9.0  # padding
    write_toy_checkpoint(tmp_path / "first", tensors)
    write_toy_checkpoint(tmp_path / "second", changed)
    assert compare(tmp_path / "first", tmp_path / "second", has_optimizer=True).is_equal
    changed[moment][3, 4] = 9.0
    write_toy_checkpoint(tmp_path / "third", changed)
    assert compare(tmp_path / "first", tmp_path / "third").is_equal
    assert kinds(compare(tmp_path / "first", tmp_path / "third", has_optimizer=True)) == {moment: "value"}
    del tensors[moment]
    write_toy_checkpoint(tmp_path / "bare", tensors)
    message = r"iter_0000010: must hold the optimizer's state as torch_dist has it, got none\. Compare without --optim"
    with pytest.raises(CheckpointError, match=message):
        compare(tmp_path / "first", tmp_path / "bare", has_optimizer=True)


# --- with Hugging Face -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, MOE_ARGUMENTS, GPT2_ARGUMENTS], ids=["llama", "moe", "gpt2"])
def test_a_checkpoint_equals_its_folder_through_the_mapping(tmp_path, changes):
    megatron_dir, hf_dir = write_toy_pair(tmp_path, changes)
    num_tensors = len(read_folder(hf_dir))
    for sides in ((megatron_dir, hf_dir), (hf_dir, megatron_dir)):
        found = compare(*sides)
        assert found.is_equal
        assert found.num_equal == num_tensors
        assert found.arguments == ()


def test_differences_of_a_folder_have_the_names_of_the_folder(tmp_path):
    megatron_dir, hf_dir = write_toy_pair(tmp_path, {})
    weights = read_folder(hf_dir)
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up].clone(), weights[gate].clone()  # the twin
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 20)
    weights["model.layers.3.mlp.up_proj.weight"] = weights[up].clone()
    del weights["lm_head.weight"]
    save_file(weights, hf_dir / "model.safetensors")
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | {"rope_theta": 20_000.0}))
    found = compare(megatron_dir, hf_dir)
    assert kinds(found) == {
        gate: "value",
        up: "value",
        "model.layers.0.self_attn.k_proj.weight": "shape",
        "model.layers.3.mlp.up_proj.weight": "unexpected",
        "lm_head.weight": "missing",
    }
    assert [(one.name, one.first, one.second) for one in found.arguments] == [("rotary_base", "10000", "20000")]
    assert kinds(compare(hf_dir, megatron_dir))["lm_head.weight"] == "unexpected"


def test_two_folders_are_compared_by_their_own_names(tmp_path):
    _, first = write_toy_pair(tmp_path / "a", {})
    _, second = write_toy_pair(tmp_path / "b", {}, hf_dtype=torch.bfloat16)
    assert compare(first, first).is_equal
    found = compare(first, second)
    assert set(kinds(found).values()) == {"dtype"}
    assert [one.name for one in found.arguments] == ["torch_dtype"]
    assert compare(first, second, ignores_dtype=True).is_equal


def test_an_architecture_that_nothing_maps_is_refused(tmp_path):
    megatron_dir, hf_dir = write_toy_pair(tmp_path, {})
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(ConversionError, match=r"model_type: must be one of .*, got model_type='gemma3': its norms"):
        compare(megatron_dir, hf_dir)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_elements", [4, 1 << 22])
def test_differences_are_counted_in_pieces(chunk_elements, monkeypatch):
    monkeypatch.setattr(checkpoint_comparison, "_CHUNK_ELEMENTS", chunk_elements)
    first = torch.arange(15.0).reshape(3, 5)
    second = first.clone()
    second[0, 0], second[2, 4] = 3.0, 14.5
    assert count_differences(first, second) == (3.0, 2)
    assert count_differences(first, first.clone()) == (0.0, 0)


def test_nan_equals_nan_and_nothing_else():
    nan, infinity = float("nan"), float("inf")
    first = torch.tensor([nan, infinity, 1.0])
    assert count_differences(first, first.clone()) == (0.0, 0)
    found, count = count_differences(first, torch.tensor([0.0, -infinity, 1.0]))
    assert (str(found), count) == ("nan", 2)
    assert count_differences(first, torch.tensor([nan, 5.0, 1.0])) == (infinity, 1)


def test_norms_that_lack_their_1_equal_those_of_the_folder(tmp_path):
    pair = write_toy_pair(
        tmp_path / "a", {"apply_layernorm_1p": True}, dtype=torch.bfloat16, has_zero_centered_norms=True
    )
    assert compare(*pair).is_equal
    unsaid = write_toy_pair(tmp_path / "b", {}, dtype=torch.bfloat16, has_zero_centered_norms=True)
    assert {name.split(".")[-2] for name in kinds(compare(*unsaid))} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
