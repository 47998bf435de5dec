"""A folder that transformers wrote, of every family: read, trained by our flags, it gives the same logits (fp32, CPU),
and split again it gives the same bits.

Nothing here is built from our own configuration: transformers' config classes say what the model is. Each family has a
twin with one thing about it ignored, which must be noticed.
"""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_hammer.checkpoint.hugging_face.config_json import build_config, read_hf_model
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.family import expand
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_dropout, read_saved_model
from megatron_hammer.checkpoint.hugging_face.tensor_sources import locate_hf_tensors
from megatron_hammer.model.accounting import count_parameters
from megatron_hammer.model.shape import SlidingWindow, YarnScaling
from tests.helpers.hf_by_hand import permute_to_megatron
from tests.helpers.reference_model import compare, randomize
from tests.helpers.toy_hf_folder import LLAMA_SIZES
from tests.helpers.toy_model import GATED_EXPERTS, GPT2, LLAMA
from tests.helpers.whole_model import build_whole_model, load_weights, read_arguments, single_rank

# Measured: at most 6e-6 on a layer and on the logits, of a standard deviation from 0.07 (tied heads) to 1.3; the twins
# differ by 0.006 to 5, those of the gelu by 6e-5 and 1e-3.
TOLERANCE = 3e-5
SIZES = {**LLAMA_SIZES, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
NO_GROUPS = {"num_key_value_heads": LLAMA.num_attention_heads}
EXPERTS = {
    "num_experts": GATED_EXPERTS.num_experts,
    "num_experts_per_tok": GATED_EXPERTS.router_topk,
    "moe_intermediate_size": GATED_EXPERTS.ffn_hidden_size,
}
GPT2_SIZES = {
    "vocab_size": GPT2.vocab_size,
    "n_embd": GPT2.hidden_size,
    "n_layer": GPT2.num_layers,
    "n_head": GPT2.num_attention_heads,
    "n_positions": GPT2.max_position_embeddings,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTIAL_SIZES = SIZES | {"hidden_size": 48}  # heads of 8 channels
# Of Granite 3; no two alike, and none a power of two.
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.7,
    "residual_multiplier": 0.22,
    "logits_scaling": 1.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# With these the ramp has more than one of a head's few pairs.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5e3,
    "factor": 5.0,
    "original_max_position_embeddings": 11,
    "beta_fast": 3.0,
    "beta_slow": 0.25,
}
SCALING = {name: YARN_ROPE[name] for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": GATED_EXPERTS.ffn_hidden_size,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
NOT_SOLAR = ("intermediate_size", "first_k_dense_replace")
GROUPS = {"n_group": 3, "topk_group": 2}


def without(**fields):
    """A change of the experts."""
    return lambda model: {"moe": dataclasses.replace(model.moe, **fields)}


# Family: (transformers' config, a change of the preset that the logits must notice).
FAMILIES = {
    "dots.llm1": (
        transformers.Dots1Config(**SIZES, **MIXED, head_dim=14, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING]),
        without(topk_scaling_factor=1.0),
    ),
    "dots.llm1 with groups": (
        transformers.Dots1Config(**SIZES, **MIXED | GROUPS, sliding_window=None),
        without(num_groups=None, group_topk=None),
    ),
    "glm 4.5": (
        transformers.Glm4MoeConfig(**SIZES, **MIXED | {"first_k_dense_replace": 2}, head_dim=12, use_qk_norm=True),
        {"rotary_percent": 1.0},
    ),
    "glm 4.5 air": (
        transformers.Glm4MoeConfig(**SIZES, **MIXED | GROUPS, attention_bias=True, partial_rotary_factor=0.5),
        without(score_function="sqrtsoftplus"),
    ),
    "solar open": (
        transformers.SolarOpenConfig(**{k: v for k, v in (SIZES | MIXED).items() if k not in NOT_SOLAR}, head_dim=14),
        without(topk_scaling_factor=1.0),
    ),
    "hunyuan 3": (
        transformers.HYV3Config(
            **SIZES,
            **EXPERTS,
            head_dim=14,
            num_shared_experts=1,
            mlp_layer_types=["sparse", "dense", "sparse"],
        ),
        without(topk_scaling_factor=1.0),
    ),
    "llama 1": (
        transformers.LlamaConfig(**SIZES | NO_GROUPS, rms_norm_eps=1e-5),
        {"norm_epsilon": 1e-6},
    ),
    "llama 2": (transformers.LlamaConfig(**SIZES), {"rotary_base": 20_000}),
    "llama 3": (
        transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        {"rotary_base": 10_000},
    ),
    "llama 3.2": (
        transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
        {"rope_scaling": None},
    ),
    "llama with positions divided": (
        transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        {"rotary_seq_len_interpolation_factor": None},
    ),
    "llama yarn": (
        transformers.LlamaConfig(**SIZES, head_dim=16, rope_parameters=YARN_ROPE),
        {"rope_scaling": YarnScaling(factor=5.0, original_max_position_embeddings=11)},
    ),
    "qwen2 yarn with its own factor": (
        transformers.Qwen2Config(
            **SIZES, head_dim=10, rope_parameters=YARN_ROPE | {"attention_factor": 0.7, "truncate": False}
        ),
        # Another rounding of the ramp, and nothing else.
        {"rope_scaling": YarnScaling(**SCALING, mscale=(0.7 - 1) / (0.1 * math.log(5)))},
    ),
    "qwen3 yarn with mscale": (
        transformers.Qwen3Config(
            **SIZES, head_dim=14, rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3}
        ),
        {"rope_scaling": YarnScaling(**SCALING)},
    ),
    "mistral": (transformers.MistralConfig(**SIZES, head_dim=14, sliding_window=None), {"rotary_base": 20_000}),
    "mistral with a window": (
        transformers.MistralConfig(**SIZES, head_dim=14, sliding_window=5),
        {"sliding_window": SlidingWindow(num_tokens=6, layers=(0, 1, 2))},
    ),
    "ministral": (
        transformers.MinistralConfig(**SIZES, head_dim=14, sliding_window=5, layer_types=[SLIDING, FULL, SLIDING]),
        {"sliding_window": SlidingWindow(num_tokens=5, layers=(0, 1))},
    ),
    "qwen2 with a window in its last layers": (
        transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        {"sliding_window": SlidingWindow(num_tokens=3, layers=(0, 1, 2))},
    ),
    "qwen3 with a window": (
        transformers.Qwen3Config(
            **SIZES, head_dim=14, use_sliding_window=True, sliding_window=1, layer_types=[FULL, SLIDING, FULL]
        ),
        {"sliding_window": None},
    ),
    "mixtral with a window": (
        transformers.MixtralConfig(
            **SIZES,
            num_local_experts=EXPERTS["num_experts"],
            num_experts_per_tok=EXPERTS["num_experts_per_tok"],
            sliding_window=4,
        ),
        {"sliding_window": SlidingWindow(num_tokens=3, layers=(0, 1, 2))},
    ),
    "qwen2 moe with a window": (
        transformers.Qwen2MoeConfig(
            **SIZES,
            **EXPERTS,
            shared_expert_intermediate_size=GATED_EXPERTS.shared_expert_intermediate_size,
            use_sliding_window=True,
            sliding_window=6,
        ),
        {"sliding_window": SlidingWindow(num_tokens=6, layers=(0, 1, 2))},
    ),
    "qwen3 moe with a window": (
        transformers.Qwen3MoeConfig(
            **SIZES, **EXPERTS, head_dim=14, norm_topk_prob=True, use_sliding_window=True, sliding_window=2
        ),
        {"sliding_window": SlidingWindow(num_tokens=2, layers=(1, 2))},
    ),
    "phi3 with a window": (
        transformers.Phi3Config(**SIZES, sliding_window=4),
        {"sliding_window": SlidingWindow(num_tokens=5, layers=(0, 1, 2))},
    ),
    "smollm3 with a window": (
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=4),
        {"sliding_window": None},
    ),
    "smollm3 with yarn": (
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], rope_parameters=YARN_ROPE),
        {"layers_without_rope": ()},
    ),
    "qwen2": (transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), {"norm_epsilon": 1e-5}),
    "qwen3": (transformers.Qwen3Config(**SIZES, head_dim=14), {"rotary_base": 20_000}),
    "mixtral": (
        transformers.MixtralConfig(
            **SIZES, num_local_experts=EXPERTS["num_experts"], num_experts_per_tok=EXPERTS["num_experts_per_tok"]
        ),
        {"rotary_base": 10_000},
    ),
    "qwen2 moe": (
        transformers.Qwen2MoeConfig(
            **SIZES, **EXPERTS, shared_expert_intermediate_size=GATED_EXPERTS.shared_expert_intermediate_size
        ),
        {"norm_epsilon": 1e-5},
    ),
    "qwen3 moe": (
        transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=14, norm_topk_prob=True),
        {"norm_epsilon": 1e-5},
    ),
    "phi3": (transformers.Phi3Config(**SIZES), {"norm_epsilon": 1e-3}),
    "phi3 that turns half of a head": (
        transformers.Phi3Config(**PARTIAL_SIZES, partial_rotary_factor=0.5),
        {"rotary_percent": 1.0},
    ),
    "seed oss": (transformers.SeedOssConfig(**SIZES, head_dim=14), {"rotary_base": 20_000}),
    "seed oss without biases": (
        transformers.SeedOssConfig(**SIZES, head_dim=14, attention_bias=False),
        {"norm_epsilon": 1e-5},
    ),
    "smollm3": (
        transformers.SmolLM3Config(**SIZES, no_rope_layer_interval=2, tie_word_embeddings=False),
        {"layers_without_rope": (0,)},
    ),
    "smollm3 by its list": (
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[0, 1, 0], tie_word_embeddings=True),
        {"layers_without_rope": (0,)},
    ),
    "granite": (transformers.GraniteConfig(**SIZES, **MULTIPLIERS), {"residual_multiplier": 1.0}),
    "granite with another scale of the scores": (
        transformers.GraniteConfig(**SIZES, attention_multiplier=0.3),
        {"attention_scale": None},
    ),
    "granite with larger embeddings": (
        transformers.GraniteConfig(**SIZES, **MULTIPLIERS),
        {"embedding_multiplier": 1.0},
    ),
    "granite with smaller logits": (
        transformers.GraniteConfig(**SIZES, **MULTIPLIERS, tie_word_embeddings=True),
        {"logits_multiplier": 1.0},
    ),
    "helium": (transformers.HeliumConfig(**SIZES, head_dim=4), {"rotary_base": 20_000}),
    "helium with biases": (
        transformers.HeliumConfig(**SIZES, head_dim=4, attention_bias=True, tie_word_embeddings=True),
        {"norm_epsilon": 1e-5},
    ),
    "qwen3 moe with dense layers": (
        transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=14, mlp_only_layers=[2]),
        {"norm_epsilon": 1e-5},
    ),
    "qwen2 moe in every second layer": (
        transformers.Qwen2MoeConfig(
            **SIZES, **EXPERTS, shared_expert_intermediate_size=9, decoder_sparse_step=2, tie_word_embeddings=True
        ),
        {"norm_epsilon": 1e-5},
    ),
    "gpt2": (transformers.GPT2Config(**GPT2_SIZES), {"activation": "gelu_erf"}),
    "gpt2 with the exact gelu": (
        transformers.GPT2Config(
            **GPT2_SIZES, n_inner=GPT2.ffn_hidden_size, activation_function="gelu", tie_word_embeddings=False
        ),
        {"activation": "gelu_tanh"},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def save_reference(config, folder, **options):
    """A model with random weights, saved by transformers."""
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(reference)
    reference.save_pretrained(folder, **options)
    return reference


def read_folder(folder):
    """The model, its config.json, and the folder's tensors under the table's names, every one of them used."""
    found = read_hf_model(folder)
    stored = load_file(folder / "model.safetensors")
    pairs = expand(found.family, found.shape)
    located = locate_hf_tensors(pairs, found.shape, {name: tuple(t.shape) for name, t in stored.items()})
    assert located.shapes.keys() == located.sources.keys()
    assert {source.name for source in located.sources.values()} == stored.keys()
    weights = {name: source.select(stored[source.name]) for name, source in located.sources.items()}
    return found.shape, json.loads((folder / "config.json").read_text()), weights


def build_ours(model, config, weights, **change):
    """Our model with these weights, permuted by hand; `change` replaces fields of what is built."""
    namespace = read_arguments(dataclasses.replace(model, name="toy", **change))
    ours = build_whole_model(namespace)
    load_weights(ours, permute_to_megatron(config, weights))
    return ours, namespace


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_transformers_is_the_same_model(name, tmp_path):
    hf_config, change = FAMILIES[name]
    reference = save_reference(hf_config, tmp_path)
    model, config, weights = read_folder(tmp_path)
    ours, namespace = build_ours(model, config, weights)
    assert max(compare(ours, reference, LLAMA.vocab_size).values()) < TOLERANCE

    num_built = sum(parameter.numel() for parameter in reference.parameters())
    assert count_parameters(model) == num_built
    padding_rows = namespace.padded_vocab_size - LLAMA.vocab_size
    padding = padding_rows * model.hidden_size * (1 if model.has_tied_embeddings else 2)
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_built + padding

    assert read_saved_model(namespace) == model  # what an export of this run will find
    change = change(model) if callable(change) else change
    twin, _ = build_ours(model, config, weights, **change)
    assert compare(twin, reference, LLAMA.vocab_size)["logits"] > TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_transformers_comes_back_bit_for_bit(name, tmp_path):
    save_reference(FAMILIES[name][0], tmp_path)
    model, config, weights = read_folder(tmp_path)
    permuted = permute_to_megatron(config, weights)
    family = select_family(model, preferred=config["model_type"])
    assert family.model_type == config["model_type"]
    back = {}
    for pair in expand(family, model):
        parts = pair.layout.split(permuted[pair.megatron_name], model)
        back |= dict(zip(pair.hf_names, parts, strict=True))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["dots.llm1 with groups", "glm 4.5", "hunyuan 3"])
def test_twin_without_the_expert_bias_other_experts_are_chosen(name, tmp_path):
    reference = save_reference(FAMILIES[name][0], tmp_path)
    model, config, weights = read_folder(tmp_path)
    biases = [name for name in weights if name.endswith("bias")]
    assert len(biases) == model.num_layers - len(model.moe.dense_layers)
    ours, _ = build_ours(model, config, weights | {name: torch.zeros_like(weights[name]) for name in biases})
    assert compare(ours, reference, LLAMA.vocab_size)["logits"] > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "qwen3 moe"])
def test_packed_experts_are_the_same_model(name, tmp_path):
    reference = save_reference(FAMILIES[name][0], tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    model, config, weights = read_folder(tmp_path)
    ours, _ = build_ours(model, config, weights)
    assert max(compare(ours, reference, LLAMA.vocab_size).values()) < TOLERANCE


# Widths that make every derived multiplier differ from 1, and from the others.
MUP = ("--use-mup", "--mup-base-hidden-size", "16", "--mup-base-head-dim", "3", "--mup-embedding-mult", "10")


def test_granite_computes_what_megatron_does_with_mup(tmp_path):
    """The oracle of the multipliers that Megatron derives: its own model, built from the flags as they are typed."""
    namespace = read_arguments(LLAMA, MUP)
    model = read_saved_model(namespace)
    fields = build_config(
        select_family(model), model, read_saved_dropout(namespace), dtype="float32", bos_id=1, eos_id=2
    )
    assert fields["model_type"] == "granite"
    reference = save_reference(transformers.AutoConfig.for_model(**fields), tmp_path)
    ours = build_whole_model(namespace)
    load_weights(ours, permute_to_megatron(fields, load_file(tmp_path / "model.safetensors")))
    assert max(compare(ours, reference, LLAMA.vocab_size).values()) < TOLERANCE
    for name, value in (("logits_scaling", 1.0), ("attention_multiplier", 0.5), ("embedding_multiplier", 1.0)):
        setattr(twin_config := copy.deepcopy(reference.config), name, value)
        twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=twin_config).eval()
        assert compare(ours, twin, LLAMA.vocab_size)["logits"] > TOLERANCE


def test_tiny_llm_zh_is_computed_by_qwen2(tmp_path):
    """Its own class is code of its folder, which is never run; Qwen2 has the same layers under the same names."""
    reference = save_reference(transformers.Qwen2Config(**SIZES | NO_GROUPS), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"], config["architectures"] = "tinyllm", ["TinyllmForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tinyllm.TinyllmForCausalLM"}
    theta = config.pop("rope_parameters")["rope_theta"]
    for name in ("layer_types", "use_sliding_window", "max_window_layers", "num_key_value_heads"):
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))
    model, config, weights = read_folder(tmp_path)
    assert model.has_qkv_bias
    assert count_parameters(model) == sum(tensor.numel() for tensor in weights.values())
    ours, _ = build_ours(model, config, weights)
    assert max(compare(ours, reference, LLAMA.vocab_size).values()) < TOLERANCE
