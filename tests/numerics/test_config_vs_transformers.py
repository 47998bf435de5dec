"""transformers reads from our config.json the architecture that we wrote."""

import json

import pytest
import torch
import transformers

from megatron_hammer.checkpoint.hugging_face.config_json import build_config, build_generation_config, interpret_config
from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.presets.catalogue import PRESETS
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments

SCALED_ROPE = {"rotary_base": 500_000, "use_rope_scaling": True, "rope_scaling_factor": 32.0}
CASES = {
    "llama": {},
    "llama with biases": {"add_bias_linear": True},
    "llama tied": {"untie_embeddings_and_output_weights": False},
    "llama of wide heads": {"kv_channels": 16, "rotary_base": 500_000},
    "llama with scaled rope": SCALED_ROPE,
    "mistral": {"hidden_size": 25},
    "mixtral": PLAIN_MOE_ARGUMENTS | {"kv_channels": 10},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 10},
    "qwen3 moe": PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True, "kv_channels": 10},
    "qwen2 moe": MOE_ARGUMENTS | {"add_qkv_bias": True},
    "qwen2 moe without bias": MOE_ARGUMENTS,
    "gpt2": GPT2_ARGUMENTS,
    "gpt2 untied": GPT2_ARGUMENTS | {"untie_embeddings_and_output_weights": True},
}


NO_DROPOUT = Dropout(attention=0.0, hidden=0.0)


def load_config(model, folder):
    config = build_config(select_family(model), model, NO_DROPOUT, dtype="bfloat16", bos_id=1, eos_id=2)
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_transformers_builds_every_mapped_tensor_and_no_other(name, tmp_path):
    model = read_saved_model(toy_arguments(**CASES[name]))
    config = load_config(model, tmp_path)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    assert type(built).__name__ == select_family(model).hf_class
    shapes = {
        hf_name: shape
        for pair in expand(select_family(model), model)
        for hf_name, shape in zip(pair.hf_names, pair.hf_shapes, strict=True)
    }
    expected = {hf_name: tuple(parameter.shape) for hf_name, parameter in built.named_parameters()}
    if model.moe is None:
        assert shapes == expected
    else:  # in memory transformers keeps a layer's experts in two tensors, and Mixtral's under other names
        shapes = {hf_name.replace(".block_sparse_moe.", ".mlp."): shape for hf_name, shape in shapes.items()}
        experts = sum(torch.Size(shape).numel() for hf_name, shape in shapes.items() if ".mlp.experts." in hf_name)
        fused = sum(torch.Size(shape).numel() for hf_name, shape in expected.items() if ".mlp.experts." in hf_name)
        assert experts == fused
        assert {k: v for k, v in shapes.items() if ".mlp.experts." not in k} == {
            k: v for k, v in expected.items() if ".mlp.experts." not in k
        }


def test_every_field_of_the_computation_reaches_transformers(tmp_path):
    arguments = toy_arguments(rotary_base=500_000, layernorm_epsilon=3e-6, kv_channels=16)
    config = load_config(read_saved_model(arguments), tmp_path)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500_000.0}
    assert config.rms_norm_eps == 3e-6
    assert config.head_dim == 16
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.max_position_embeddings == 32


def test_the_scaled_rope_reaches_transformers(tmp_path):
    config = load_config(read_saved_model(toy_arguments(**SCALED_ROPE)), tmp_path)
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("is_pre_softmax", [False, True])
def test_the_router_reaches_transformers(is_pre_softmax, tmp_path):
    arguments = toy_arguments(**MOE_ARGUMENTS | {"moe_router_pre_softmax": is_pre_softmax})
    config = load_config(read_saved_model(arguments), tmp_path)
    assert config.norm_topk_prob == (not is_pre_softmax)
    assert (config.num_experts, config.num_experts_per_tok) == (5, 2)


@pytest.mark.parametrize("fusion, activation", [(True, "gelu_new"), (False, "gelu")])
def test_the_activation_of_gpt2_reaches_transformers(fusion, activation, tmp_path):
    model = read_saved_model(toy_arguments(**GPT2_ARGUMENTS | {"bias_gelu_fusion": fusion}))
    assert load_config(model, tmp_path).activation_function == activation


def test_a_tokenizer_without_ids_leaves_them_out():
    assert build_generation_config(bos_id=None, eos_id=2) == {"eos_token_id": 2, "pad_token_id": 2}
    assert build_generation_config(bos_id=None, eos_id=None) == {}


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("open-llama-7b", "hammer-tiny-moe")])
def test_every_preset_has_a_class_with_exactly_its_parameters(name):
    from megatron_hammer.config.model_arguments import build_model_arguments

    preset = PRESETS[name].model
    arguments = toy_arguments(**{"bias_gelu_fusion": True, "moe_layer_freq": 1, **build_model_arguments(preset)})
    model = read_saved_model(arguments)
    pairs = expand(select_family(model), model)
    num_parameters = sum(torch.Size(shape).numel() for pair in pairs for shape in pair.hf_shapes)
    assert num_parameters == count_parameters(preset) == PRESETS[name].num_parameters
    config = build_config(select_family(model), model, NO_DROPOUT, dtype="bfloat16", bos_id=1, eos_id=2)
    assert interpret_config(config) == (model, NO_DROPOUT)
    assert model == preset
