import pytest
import torch
import transformers

from megatron_hammer.checkpoint.gguf.experts import name_stack, read_stacks, spell_for_lookup
from megatron_hammer.checkpoint.gguf.file_types import FILE_TYPES
from megatron_hammer.checkpoint.gguf.tensors import plan_tensors
from megatron_hammer.checkpoint.hugging_face.config_json import read_hf_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import MoeShape
from tests.helpers.gguf_models import FAMILIES, SIZES

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


def read_model(folder, family, **changes):
    config_class, own = FAMILIES[family]
    config_class(**(SIZES | own | changes)).save_pretrained(folder)
    return read_hf_model(folder)


def test_experts_of_a_layer_are_one_tensor_in_their_order():
    stack = name_stack(EXPERT.format(0))
    assert (stack, name_stack(EXPERT.format(1))) == ("model.layers.1.mlp.experts.*.up_proj.weight", None)
    assert spell_for_lookup(stack) == "model.layers.1.mlp.experts.up_proj.weight"
    stored = {EXPERT.format(expert): torch.full((2, 3), float(expert)) for expert in range(12)} | {
        "other": torch.ones(2)
    }
    read = read_stacks(stored.__getitem__, MoeShape(num_experts=12, router_topk=2, ffn_hidden_size=2))
    assert torch.equal(read(stack)[:, 0, 0], torch.arange(12.0))
    assert torch.equal(read("other"), torch.ones(2))


def test_names_and_shapes_are_llama_cpps(tmp_path):
    planned = {tensor.name: tensor for tensor in plan_tensors(read_model(tmp_path, "glm 4.5"), FILE_TYPES["q8_0"])}
    assert planned["blk.2.ffn_gate_exps.weight"].shape == (10, 64, 96)
    assert planned["blk.2.ffn_down_exps.weight"].shape == (10, 96, 64)
    assert planned["blk.2.ffn_up_shexp.weight"].shape == (128, 96)
    kinds = {name: planned[f"blk.2.{name}"].type.name for name in ("exp_probs_b.bias", "ffn_gate_inp.weight")}
    assert set(kinds.values()) == {"F32"}
    assert "blk.1.ffn_gate.weight" in planned  # a dense layer
    assert "blk.1.ffn_gate_inp.weight" not in planned


@pytest.mark.parametrize(
    ("family", "changes", "file_type", "problem"),
    [
        ("glm 4.5", {}, "q4_k_m", r"type: must be f32, f16, bf16 or q8_0 for mixtures of experts"),
        (
            "glm 4.5",
            {"n_group": 5, "topk_group": 2, "num_experts_per_tok": 4},
            "f16",
            r"n_group: must be 1, .*n_group=5, topk_group=2",
        ),
        ("dots.llm1", {"num_key_value_heads": 2}, "f16", r"num_key_value_heads: .*got num_key_value_heads=2"),
        (
            "dots.llm1",
            {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
            "f16",
            r"sliding_window: must be null",
        ),
    ],
)
def test_what_is_not_written_is_named(tmp_path, family, changes, file_type, problem):
    with pytest.raises(ConversionError, match=problem):
        plan_tensors(read_model(tmp_path, family, **changes), FILE_TYPES[file_type])


def test_hunyuan_3_has_no_arch(tmp_path):
    transformers.HYV3Config(**SIZES, num_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"GGUF is written for .* got model_type='hy_v3'"):
        plan_tensors(read_hf_model(tmp_path), FILE_TYPES["f16"])
