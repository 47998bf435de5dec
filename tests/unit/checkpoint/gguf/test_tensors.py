"""Names, order and layout of a model's tensors in a GGUF file; what is not mapped is refused."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_hammer.checkpoint.gguf.file_types import FILE_TYPES
from megatron_hammer.checkpoint.gguf.tensors import compute_rope_factors, plan_tensors
from megatron_hammer.checkpoint.hugging_face.config_json import HfModel, interpret_config
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.folder import open_hf_folder
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import RopeScaling
from tests.helpers.gguf_models import LLAMA3_ROPE, write_gguf_source
from tests.helpers.toy_hf_folder import LLAMA_CONFIG


def interpret(**changes) -> HfModel:
    config = LLAMA_CONFIG | changes
    shape, dropout = interpret_config(config)
    return HfModel(shape=shape, dropout=dropout, family=select_family(shape), dtype=None, config=config)


def test_every_tensor_has_llama_cpps_name_once():
    tensors = plan_tensors(interpret(), FILE_TYPES["f16"])
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names) == 3 * 9 + 3
    assert names[0] == "token_embd.weight"
    assert set(names[1:10]) == {
        f"blk.0.{name}.weight"
        for name in [
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_norm",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ]
    }
    by_name = {tensor.name: tensor for tensor in tensors}
    assert by_name["blk.2.ffn_gate.weight"].hf_name == "model.layers.2.mlp.gate_proj.weight"
    assert by_name["blk.1.attn_k.weight"].shape == (8, 24)
    assert by_name["blk.1.attn_k.weight"].type is Type.F16
    assert by_name["output_norm.weight"].type is Type.F32


def test_only_q_and_k_of_arch_llama_are_permuted():
    heads = {tensor.name: tensor.rope_heads for tensor in plan_tensors(interpret(), FILE_TYPES["f32"])}
    assert {name: count for name, count in heads.items() if count is not None and ".0." in name} == {
        "blk.0.attn_q.weight": 6,
        "blk.0.attn_k.weight": 2,
    }
    qwen = interpret(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    planned = plan_tensors(qwen, FILE_TYPES["f32"])
    assert {tensor.rope_heads for tensor in planned} == {None}
    assert "blk.2.attn_v.bias" in {tensor.name for tensor in planned}


def test_other_families_are_refused_by_name():
    gpt2 = interpret(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=24, n_head=6, n_layer=3, n_positions=32
    )
    with pytest.raises(
        ConversionError,
        match=r"^config\.json, model_type: GGUF is written for Llama.*got model_type='gpt2', which is GPT2LMHeadModel",
    ):
        plan_tensors(gpt2, FILE_TYPES["f32"])


def test_another_pattern_of_layers_without_a_rope_than_llama_cpps_is_refused():
    config = LLAMA_CONFIG | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
    shape, dropout = interpret_config(config | {"no_rope_layer_interval": 2})
    folder = HfModel(shape=shape, dropout=dropout, family=select_family(shape), dtype=None, config=config)
    with pytest.raises(ConversionError, match=r"no_rope_layers: .*every 4th layer.*got none in layers \[1\] of 3"):
        plan_tensors(folder, FILE_TYPES["f32"])


def test_rope_factors_are_those_of_transformers():
    scaling = RopeScaling(factor=4.0)
    config = LlamaConfig(hidden_size=192, num_attention_heads=6, head_dim=32, rope_parameters=LLAMA3_ROPE)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / (5000.0 ** (torch.arange(0, 32, 2).float() / 32))
    factors = compute_rope_factors(scaling, rotary_base=5000.0, head_dim=32)
    torch.testing.assert_close(plain / factors, expected, rtol=1e-6, atol=0)
    assert factors[0] == 1
    assert factors[-1] == 4
    assert ((factors > 1) & (factors < 4)).any()
    other = compute_rope_factors(RopeScaling(factor=3.0), rotary_base=5000.0, head_dim=32)
    assert not torch.allclose(other, factors)


def test_missing_and_unexpected_tensors_are_listed_together(tmp_path):
    folder = write_gguf_source(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ConversionError) as caught:
        open_hf_folder(folder)
    assert len(caught.value.problems) == 9
    assert all(problem.startswith("model.layers.3.") for problem in caught.value.problems)


def test_a_window_that_llama_cpp_does_not_have_is_refused():
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    with pytest.raises(ConversionError, match=r"sliding_window: must be null, got sliding_window=8: .*arch llama has"):
        plan_tensors(interpret(**windowed), FILE_TYPES["f16"])
    assert plan_tensors(interpret(**windowed | {"sliding_window": None}), FILE_TYPES["f16"])
