"""The rows name every tensor of both sides, are exact in both directions, and all mismatches are named at once."""

import pytest
import torch

from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_rows import validate_names_and_shapes
from megatron_hammer.errors import ConversionError
from tests.helpers.messages import assert_problems
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments

FAMILIES = {
    "llama": ({}, "LlamaForCausalLM"),
    "llama with biases": ({"add_bias_linear": True}, "LlamaForCausalLM"),
    "llama tied": ({"untie_embeddings_and_output_weights": False}, "LlamaForCausalLM"),
    "qwen2": ({"add_qkv_bias": True}, "Qwen2ForCausalLM"),
    "qwen2 moe": (MOE_ARGUMENTS | {"add_qkv_bias": True}, "Qwen2MoeForCausalLM"),
    "qwen2 moe without bias": (MOE_ARGUMENTS, "Qwen2MoeForCausalLM"),
    "qwen2 moe of wide heads": (MOE_ARGUMENTS | {"kv_channels": 8}, "Qwen2MoeForCausalLM"),
    "qwen3": ({"qk_layernorm": True, "kv_channels": 10}, "Qwen3ForCausalLM"),
    "qwen3 moe": (PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True}, "Qwen3MoeForCausalLM"),
    "mixtral": (PLAIN_MOE_ARGUMENTS, "MixtralForCausalLM"),
    "mistral, for heads that do not fill the width": ({"hidden_size": 25}, "MistralForCausalLM"),
    "gpt2": (GPT2_ARGUMENTS, "GPT2LMHeadModel"),
}


def pairs_of(name: str):
    model = read_saved_model(toy_arguments(**FAMILIES[name][0]))
    return model, expand(select_family(model), model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_the_class_of_transformers(name):
    assert select_family(read_saved_model(toy_arguments(**FAMILIES[name][0]))).hf_class == FAMILIES[name][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_name_appears_twice(name):
    _, pairs = pairs_of(name)
    megatron_names = [pair.megatron_name for pair in pairs]
    hf_names = [hf_name for pair in pairs for hf_name in pair.hf_names]
    assert len(set(megatron_names)) == len(megatron_names)
    assert len(set(hf_names)) == len(hf_names)
    assert not any("{" in name or "<" in name for name in megatron_names + hf_names)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_exact_in_both_directions(name):
    model, pairs = pairs_of(name)
    for pair in pairs:
        tensor = torch.randn(pair.megatron_shape)
        parts = pair.layout.split(tensor, model)
        assert tuple(tuple(part.shape) for part in parts) == pair.hf_shapes
        assert len(parts) == len(pair.hf_names)
        assert torch.equal(pair.layout.merge(parts, model), tensor)


def test_llama_is_expanded_in_the_order_of_the_model():
    _, pairs = pairs_of("llama")
    assert len(pairs) == 1 + 3 * 6 + 2
    assert pairs[0].hf_names == ("model.embed_tokens.weight",)
    assert pairs[0].megatron_shape == (53, 24)
    assert pairs[2].megatron_name == "decoder.layers.0.self_attention.linear_qkv.weight"
    assert pairs[2].hf_names == tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    assert pairs[2].hf_shapes == ((24, 24), (8, 24), (8, 24))
    assert pairs[-1].hf_names == ("lm_head.weight",)


def test_every_expert_has_its_own_names():
    _, pairs = pairs_of("qwen2 moe")
    names = [name for pair in pairs for name in pair.hf_names]
    assert sum(".mlp.experts." in name for name in names) == 3 * 5 * 3
    assert "model.layers.2.mlp.experts.4.gate_proj.weight" in names
    assert "model.layers.2.mlp.shared_expert_gate.weight" in names


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedding_norm": True}, "embedding_norm=True: transformers has no Open-Llama class"),
        ({"normalization": "LayerNorm"}, "LayerNorm with rope"),
        (GPT2_ARGUMENTS | {"add_bias_linear": False}, "LayerNorm without biases"),
        (GPT2_ARGUMENTS | {"swiglu": True}, "gated MLP"),
        (GPT2_ARGUMENTS | {"group_query_attention": True}, "num_query_groups=2"),
        (GPT2_ARGUMENTS | {"kv_channels": 8}, "kv_channels=8"),
        ({"position_embedding_type": "learned_absolute"}, "RMSNorm with learned positions"),
        ({"swiglu": False}, "activation=gelu"),
        (GPT2_ARGUMENTS | {"qk_layernorm": True}, "LayerNorm with qk_layernorm=True"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "qk_layernorm=True with a bias"),
        ({"add_bias_linear": True, "hidden_size": 25}, "kv_channels=4 with biases"),
        (MOE_ARGUMENTS | {"moe_shared_expert_gate": False}, "a shared expert without its gate"),
        (MOE_ARGUMENTS | {"qk_layernorm": True}, "qk_layernorm=True with a shared expert"),
        (MOE_ARGUMENTS | {"add_bias_linear": True}, "experts with add_bias_linear"),
        (PLAIN_MOE_ARGUMENTS | {"add_qkv_bias": True}, "experts with a QKV bias and no shared expert"),
        (PLAIN_MOE_ARGUMENTS | {"moe_router_pre_softmax": True}, "experts with moe_router_pre_softmax=True, no shared"),
    ],
)
def test_an_architecture_without_a_class_is_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        select_family(read_saved_model(toy_arguments(**changes)))


def test_all_tensors_that_do_not_fit_are_named_at_once():
    expected = {"a": (1, 2), "b": (3,), "c": (4,)}
    with pytest.raises(ConversionError) as caught:
        validate_names_and_shapes(expected, {"b": (5,), "c": (4,), "d": (6,)}, where="here")
    assert_problems(
        [problem.split(".")[0] for problem in caught.value.problems],
        ("a:", "the architecture needs it", "(1, 2)", "got none in here"),
        ("d:", "nothing maps it", "got a tensor of shape (6,) in here"),
        ("b:", "expected shape (3,)", "got (5,) in here"),
    )
    validate_names_and_shapes(expected, expected, where="here")
