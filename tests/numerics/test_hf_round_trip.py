"""Hugging Face -> Megatron -> Hugging Face gives every family back bit for bit: weights, and the config they need.

transformers writes the folders, in the forms that are in circulation, and loads what comes back.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_hammer.checkpoint.convert.from_hugging_face import ImportOptions, import_from_hugging_face
from megatron_hammer.checkpoint.convert.to_hugging_face import ExportOptions, export_to_hugging_face
from megatron_hammer.checkpoint.hugging_face.config_json import read_hf_model

# No two sizes alike.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # transformers' grouped products want multiples of 16 bytes
MIXED = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 10}
FULL, SLIDING = "full_attention", "sliding_attention"
GPT2_SIZES = {"vocab_size": 61, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32, "n_inner": 40}
GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, head_dim=10),
    "llama with biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama 3.2": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": transformers.MistralConfig(**SIZES, sliding_window=5),
    "ministral": transformers.MinistralConfig(
        **SIZES, head_dim=10, sliding_window=5, layer_types=[SLIDING, FULL, FULL]
    ),
    "qwen2 with a window and yarn": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2, rope_parameters=YARN_ROPE
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=14),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "qwen2 moe": transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=36),
    "qwen3 moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=14),
    "phi3": transformers.Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "seed oss": transformers.SeedOssConfig(**SIZES, head_dim=14),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 0]),
    "granite": transformers.GraniteConfig(**SIZES, embedding_multiplier=12.0, logits_scaling=1.3),
    "helium": transformers.HeliumConfig(**SIZES, head_dim=8, attention_bias=True),
    "dots.llm1": transformers.Dots1Config(**SIZES, **MIXED, n_group=3, topk_group=2, sliding_window=None),
    "glm 4.5": transformers.Glm4MoeConfig(**SIZES, **MIXED, head_dim=14, use_qk_norm=True, attention_bias=True),
    "hunyuan 3": transformers.HYV3Config(**SIZES, **EXPERTS, mlp_layer_types=["sparse", "dense", "sparse"]),
    "qwen3 moe with dense layers": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[0, 2]),
    "gpt2": transformers.GPT2Config(**GPT2_SIZES),
    "gpt2 with a head of its own": transformers.GPT2Config(**GPT2_SIZES, tie_word_embeddings=False),
}


def save_reference(config, folder, **options):
    """A model of transformers with random weights, biases and norms too."""
    torch.manual_seed(11)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):  # fp32 beside bf16 weights
            buffer.data = torch.randn(buffer.shape, dtype=torch.float32)
    reference.save_pretrained(folder, **options)
    return reference


def go_and_return(folder):
    """Import `folder`, export what was written; returns the export's folder."""
    checkpoint, target = folder.with_name("megatron"), folder.with_name("again")
    import_from_hugging_face(ImportOptions(hf_dir=folder, save_dir=checkpoint, verify="tensors"))
    export_to_hugging_face(ExportOptions(load_dir=checkpoint, save_dir=target, verify="tensors"))
    return target


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name, tmp_path):
    reference = save_reference(FAMILIES[name], tmp_path / "hf")
    target = go_and_return(tmp_path / "hf")
    weights = load_file(target / "model.safetensors")
    assert_same_bits(load_file(tmp_path / "hf" / "model.safetensors"), weights)
    before, after = (read_hf_model(folder).shape for folder in (tmp_path / "hf", target))
    assert before == after
    assert read_hf_model(target).config["model_type"] == FAMILIES[name].model_type
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    assert_same_bits(reference.state_dict(), loaded.state_dict())
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(reference.eval()(tokens).logits, loaded.eval()(tokens).logits)


def test_shards_and_pytorch_files_give_the_same_checkpoint(tmp_path):
    reference = save_reference(FAMILIES["qwen3 moe"], tmp_path / "hf")
    save_reference(FAMILIES["qwen3 moe"], tmp_path / "shards" / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "shards" / "hf").glob("model-*.safetensors"))) > 3
    (tmp_path / "bin" / "hf").mkdir(parents=True)
    reference.config.save_pretrained(tmp_path / "bin" / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(weights, tmp_path / "bin" / "hf" / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "shards", tmp_path / "bin"):
        assert_same_bits(weights, load_file(go_and_return(folder / "hf") / "model.safetensors"))


def test_a_requested_dtype_leaves_the_expert_bias_in_fp32(tmp_path):
    save_reference(FAMILIES["glm 4.5"], tmp_path / "hf")
    import_from_hugging_face(
        ImportOptions(hf_dir=tmp_path / "hf", save_dir=tmp_path / "fp16", verify="tensors", dtype="fp16")
    )
    export_to_hugging_face(
        ExportOptions(load_dir=tmp_path / "fp16", save_dir=tmp_path / "again", verify="tensors", dtype="bf16")
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(before[bias], after[bias])
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} == {
        bias,
        bias.replace("layers.1", "layers.2"),
    }


def test_layers_of_multi_token_prediction_are_left_out_and_named(tmp_path):
    save_reference(FAMILIES["glm 4.5"], tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(48, 96), "model.layers.3.enorm.weight": torch.ones(48)}
    save_file(weights | extra, tmp_path / "hf" / "model.safetensors")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    options = ImportOptions(hf_dir=tmp_path / "hf", save_dir=tmp_path / "megatron", verify="tensors")
    report = import_from_hugging_face(options)
    assert report.num_skipped == 2
    assert any(
        "2 tensors were left out, model.layers.3.eh_proj.weight the first: multi" in note for note in report.notes
    )
    again = ExportOptions(load_dir=tmp_path / "megatron", save_dir=tmp_path / "again", verify="tensors")
    export_to_hugging_face(again)
    assert_same_bits(weights, load_file(tmp_path / "again" / "model.safetensors"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "dots.llm1", "hunyuan 3"])
def test_experts_that_transformers_packs_are_taken_apart(name, tmp_path):
    save_reference(FAMILIES[name], tmp_path / "hf")
    save_reference(FAMILIES[name], tmp_path / "packed" / "hf", save_original_format=False)
    packed = load_file(tmp_path / "packed" / "hf" / "model.safetensors")
    assert packed["model.layers.2.mlp.experts.gate_up_proj"].dim() == 3
    target = go_and_return(tmp_path / "packed" / "hf")
    assert_same_bits(load_file(tmp_path / "hf" / "model.safetensors"), load_file(target / "model.safetensors"))


def test_gpt2_as_it_is_published_comes_back_with_the_names_of_today(tmp_path):
    """openai-community/gpt2 has no `transformer.` before its names, and the causal masks among its weights."""
    save_reference(FAMILIES["gpt2"], tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    published = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(3)}
    save_file(published | masks, tmp_path / "hf" / "model.safetensors")
    assert_same_bits(weights, load_file(go_and_return(tmp_path / "hf") / "model.safetensors"))


def test_another_weight_does_not_come_back(tmp_path):
    """The twin: one changed bit on the way is a difference."""
    save_reference(FAMILIES["qwen2"], tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    again = load_file(go_and_return(tmp_path / "hf") / "model.safetensors")
    again["model.layers.1.self_attn.k_proj.bias"].view(torch.int16)[3] ^= 1
    with pytest.raises(AssertionError, match=r"model.layers.1.self_attn.k_proj.bias"):
        assert_same_bits(weights, again)
