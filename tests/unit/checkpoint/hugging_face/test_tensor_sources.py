"""Folders that name or pack the same tensors differently are read; tensors without a mapping stay visible."""

import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_rows import validate_names_and_shapes
from megatron_hammer.checkpoint.hugging_face.tensor_sources import locate_hf_tensors
from megatron_hammer.errors import ConversionError
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments

QWEN3_MOE = PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True}


def build_table(**changes):
    """Architecture, pairs, and random tensors under the table's own names."""
    model = read_saved_model(toy_arguments(**changes))
    pairs = expand(select_family(model), model)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for pair in pairs
        for name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)
    }
    return model, pairs, tensors


def locate(model, pairs, stored):
    return locate_hf_tensors(pairs, model, {name: tuple(tensor.shape) for name, tensor in stored.items()})


def assert_found(located, stored, tensors):
    """Every tensor of the table is found, with its values and its shape, and nothing is left over."""
    assert located.sources.keys() == tensors.keys()
    assert located.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(located.sources[name].select(stored[located.sources[name].name]), tensor), name


@pytest.mark.parametrize(
    "changes", [{}, GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS], ids=["llama", "gpt2", "moe", "mixtral"]
)
def test_transformers_own_names_are_found(changes):
    model, pairs, tensors = build_table(**changes)
    located = locate(model, pairs, tensors)
    assert_found(located, tensors, tensors)
    assert (located.duplicates, located.buffers) == ({}, {})


def test_gpt2_without_its_prefix_and_with_its_masks_is_found():
    model, pairs, tensors = build_table(**GPT2_ARGUMENTS)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.2.attn.masked_bias": torch.tensor(-1e4)}
    located = locate(model, pairs, stored | masks)
    assert_found(located, stored, tensors)
    assert set(located.buffers) == set(masks)


@pytest.mark.parametrize("changes", [MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, QWEN3_MOE], ids=["qwen2", "mixtral", "qwen3"])
def test_packed_experts_are_taken_apart(changes):
    model, pairs, tensors = build_table(**changes)
    stored = pack_experts(tensors, num_layers=3, num_experts=5)
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored
    assert_found(locate(model, pairs, stored), stored, tensors)


def pack_experts(tensors, *, num_layers: int, num_experts: int):
    """As transformers 5 keeps them in memory."""
    is_mixtral = any("block_sparse_moe" in name for name in tensors)
    moe, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if is_mixtral else ("mlp", *MLP_NAMES)
    stored = {name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(num_layers):
        experts = [f"model.layers.{layer}.{moe}.experts.{expert}" for expert in range(num_experts)]
        packed = f"model.layers.{layer}.mlp.experts"
        halves = [torch.cat([tensors[f"{e}.{gate}.weight"], tensors[f"{e}.{up}.weight"]]) for e in experts]
        stored[f"{packed}.gate_up_proj"] = torch.stack(halves)
        stored[f"{packed}.down_proj"] = torch.stack([tensors[f"{e}.{down}.weight"] for e in experts])
    return stored


MLP_NAMES = ("gate_proj", "up_proj", "down_proj")


def test_twin_packed_with_up_before_gate_is_not_the_same():
    model, pairs, tensors = build_table(**PLAIN_MOE_ARGUMENTS)
    stored = pack_experts(tensors, num_layers=3, num_experts=5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored[name] = stored[name].roll(12, dims=1)
    source = locate(model, pairs, stored).sources["model.layers.0.block_sparse_moe.experts.4.w1.weight"]
    assert torch.equal(source.select(stored[name]), tensors["model.layers.0.block_sparse_moe.experts.4.w3.weight"])


def test_packed_experts_of_another_number_are_missing_and_unexpected():
    model, pairs, tensors = build_table(**PLAIN_MOE_ARGUMENTS)
    stored = pack_experts(tensors, num_layers=3, num_experts=5)
    name = "model.layers.2.mlp.experts.down_proj"
    stored[name] = stored[name][:4]
    located = locate(model, pairs, stored)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with pytest.raises(ConversionError) as caught:
        validate_names_and_shapes(expected, located.shapes, where="here")
    assert len(caught.value.problems) == 6
    assert "model.layers.2.mlp.experts.down_proj: nothing maps it, got a tensor of shape (4, 24, 12)" in str(
        caught.value
    )


def test_a_tied_head_is_a_duplicate_of_the_embedding():
    model, pairs, tensors = build_table(untie_embeddings_and_output_weights=False)
    assert "lm_head.weight" not in tensors
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    located = locate(model, pairs, stored)
    assert located.duplicates == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_found(located, stored, tensors)


def test_twin_an_untied_head_is_not():
    model, pairs, tensors = build_table()
    assert locate(model, pairs, tensors).duplicates == {}


def test_rotary_frequencies_are_a_buffer_and_anything_else_is_unexpected():
    model, pairs, tensors = build_table()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.adapter.weight": torch.ones(3),
    }
    located = locate(model, pairs, tensors | extra)
    assert list(located.buffers) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert located.shapes["model.layers.0.adapter.weight"] == (3,)
    assert "model.layers.0.adapter.weight" not in located.sources
