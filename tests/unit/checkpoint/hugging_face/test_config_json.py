"""Reading config.json is the exact inverse of build_config; all unsupported fields are named at once."""

import dataclasses
import json

import pytest
import transformers

from megatron_hammer.checkpoint.hugging_face.config_json import build_config, interpret_config, read_hf_model
from megatron_hammer.checkpoint.hugging_face.config_rows import Dropout
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.families.granite import find_divisor
from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_dropout, read_saved_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import RopeScaling
from tests.helpers.messages import assert_problems
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments

SCALING = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
MULTIPLIERS = {
    "use_mup": True,
    "mup_base_hidden_size": None,
    "mup_base_head_dim": None,
    "mup_embedding_mult": 12.0,
    "mup_output_mult": 1.0,
    "mup_attn_scale_power": 1.0,
}
CASES = {
    "llama": {"attention_dropout": 0.25, "init_method_std": 0.006},
    "llama with biases": {"add_bias_linear": True},
    "llama tied": {"untie_embeddings_and_output_weights": False},
    "llama of wide heads": {"kv_channels": 16, "rotary_base": 500_000, "layernorm_epsilon": 3e-6},
    "llama with scaled rope": SCALING,
    "llama with positions divided": {"rotary_seq_len_interpolation_factor": 4},
    "llama with yarn": {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0},
    "qwen2 with all of yarn": {
        **{"add_qkv_bias": True, "position_embedding_type": "yarn", "rotary_scaling_factor": 2.5},
        **{"yarn_original_max_position_embeddings": 24, "yarn_beta_fast": 20.0, "yarn_beta_slow": 2.0},
        **{"mscale": 0.7, "mscale_all_dim": 0.9, "yarn_correction_range_round_to_int": False},
    },
    "mistral": {"hidden_size": 25},
    "qwen2": {"add_qkv_bias": True},
    "qwen2 with scaled rope": SCALING | {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 10, "untie_embeddings_and_output_weights": False},
    "mixtral": PLAIN_MOE_ARGUMENTS | {"ffn_hidden_size": 12},
    "qwen2 moe": MOE_ARGUMENTS | {"add_qkv_bias": True, "moe_router_pre_softmax": True},
    "qwen2 moe without bias": MOE_ARGUMENTS | {"moe_aux_loss_coeff": 0.002},
    "qwen3 moe": PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True, "kv_channels": 10},
    "phi3": {"rotary_percent": 0.5, "hidden_dropout": 0.25},
    "smollm3": {"no_rope_freq": 3, "add_bias_linear": True},
    "smollm3 by its list": {"no_rope_freq": [1, 0, 1], "rotary_base": 2_000_000},
    "granite": MULTIPLIERS | {"residual_multiplier": 0.22},
    "granite of larger logits": MULTIPLIERS | {"mup_output_mult": 1 / 49, "mup_attn_scale_power": 0.5},
    "mistral with a window": {"window_size": (7, 0)},
    "ministral": {"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1]},
    "qwen2 with a window": {"add_qkv_bias": True, "window_size": (3, 0), "window_attn_skip_freq": 2},
    "qwen3 with a window": {"qk_layernorm": True, "kv_channels": 10, "window_size": (0, 0)},
    "mixtral with a window": PLAIN_MOE_ARGUMENTS | {"ffn_hidden_size": 12, "window_size": (7, 0)},
    "qwen2 moe with a window": MOE_ARGUMENTS | {"window_size": (7, 0), "window_attn_skip_freq": [0, 1, 0]},
    "qwen3 moe with a window": PLAIN_MOE_ARGUMENTS | {"qk_layernorm": True, "kv_channels": 10, "window_size": (7, 0)},
    "gpt2": GPT2_ARGUMENTS | {"attention_dropout": 0.1, "hidden_dropout": 0.2},
    "gpt2 untied with the exact gelu": GPT2_ARGUMENTS
    | {"untie_embeddings_and_output_weights": True, "bias_gelu_fusion": False},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GLM4_MOE = LLAMA | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
HY_V3 = LLAMA | {
    "architectures": ["HYV3ForCausalLM"],
    "model_type": "hy_v3",
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 12,
}
QWEN3_MOE = QWEN3 | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
QWEN2_MOE = QWEN3_MOE | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 9,
}
MIXTRAL = MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
GRANITE = LLAMA | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
SEED_OSS = LLAMA | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "num_key_value_heads": 2}
HELIUM = LLAMA | {"architectures": ["HeliumForCausalLM"], "model_type": "helium", "num_key_value_heads": 2}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_case(name):
    """(shape, dropout) of a checkpoint that saved the case's arguments"""
    arguments = toy_arguments(**CASES[name])
    return read_saved_model(arguments), read_saved_dropout(arguments)


def read_shape(config):
    return interpret_config(config)[0]


def write_config(model, dropout, folder):
    config = build_config(select_family(model), model, dropout, dtype="bfloat16", bos_id=1, eos_id=2)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_comes_back_exactly(name, tmp_path):
    model, dropout = read_case(name)
    write_config(model, dropout, tmp_path)
    read = read_hf_model(tmp_path)
    assert (read.shape, read.dropout) == (model, dropout)
    assert read.family == select_family(model)
    assert read.dtype == "bfloat16"
    assert read.config["vocab_size"] == 53


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_comes_back_exactly_from_what_transformers_saves(name, tmp_path):
    """transformers reads our file and writes its own, in its own spelling."""
    model, dropout = read_case(name)
    write_config(model, dropout, tmp_path)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    read = read_hf_model(tmp_path / "again")
    assert (read.shape, read.dropout) == (model, dropout)
    assert read.dtype == "bfloat16"


def test_twin_another_field_gives_another_architecture():
    llama = read_shape(LLAMA)
    assert read_shape(LLAMA | {"rope_theta": 5e5}) == dataclasses.replace(llama, rotary_base=500_000)
    assert read_shape(LLAMA | {"rms_norm_eps": 1e-5}) == dataclasses.replace(llama, norm_epsilon=1e-5)
    assert read_shape(LLAMA | {"tie_word_embeddings": True}) == dataclasses.replace(llama, has_tied_embeddings=True)


def test_absent_fields_mean_what_transformers_takes_them_for():
    """Llama 1's file knows neither groups nor rotary base; GPT-2's has n_inner null."""
    llama = read_shape(LLAMA)
    built = transformers.LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    assert (llama.num_query_groups, llama.head_dim) == (built.num_key_value_heads, built.head_dim) == (6, 4)
    assert (llama.rotary_base, llama.norm_epsilon) == (built.rope_parameters["rope_theta"], built.rms_norm_eps)
    gpt2 = read_shape(GPT2 | {"n_inner": None})
    assert (gpt2.ffn_hidden_size, gpt2.activation, gpt2.has_tied_embeddings) == (96, "gelu_tanh", True)
    assert interpret_config(GPT2)[1] == Dropout(attention=0.1, hidden=0.1)
    assert read_shape(MIXTRAL).rotary_base == transformers.MixtralConfig().rope_parameters["rope_theta"] == 1e6
    assert read_shape(MIXTRAL).norm_epsilon == transformers.MixtralConfig().rms_norm_eps
    assert read_shape(QWEN3).head_dim == transformers.Qwen3Config().head_dim == 128
    assert read_shape(QWEN3_MOE).head_dim == 4
    assert not read_shape(QWEN3_MOE).moe.is_topk_renormalized
    assert read_shape(QWEN2_MOE).has_qkv_bias


PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def test_phi3_is_read_as_it_is_published():
    """Its folders name the code that transformers' class was made of, and turn a share of a head in two spellings."""
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "hidden_size": 48}
    assert read_shape(PHI3 | code).rotary_percent == 1
    for partial in (
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ):
        assert read_shape(PHI3 | code | partial).rotary_percent == 0.75
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(ConversionError, match=r"rope_scaling: cannot be converted, .*longrope: transformers takes it"):
        interpret_config(PHI3 | code | {"rope_scaling": longrope})
    with pytest.raises(ConversionError, match=r"partial_rotary_factor: must be a share .*=1\.5"):
        interpret_config(PHI3 | code | {"partial_rotary_factor": 1.5})


SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, ()),  # every fourth of three
        ({"no_rope_layer_interval": 2}, (1,)),
        ({"no_rope_layer_interval": 2, "no_rope_layers": [0, 1, 1]}, (0,)),  # the list counts
        ({"no_rope_layers": [1, 1, 0, 0, 0]}, (2,)),  # a longer list is read as far as there are layers
    ],
)
def test_layers_without_a_rope_are_read_as_transformers_reads_them(fields, layers):
    assert read_shape(SMOLLM3 | fields).layers_without_rope == layers


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, r"no_rope_layers: must be a list with 1 or 0 for each of 3 layers"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval: must be a positive whole number"),
        (LLAMA | {"no_rope_layers": [1, 0, 1]}, "no_rope_layers: cannot be converted"),
        (LLAMA | {"embedding_multiplier": 12.0}, "embedding_multiplier: cannot be converted"),
        (GRANITE | {"logits_scaling": 0.0}, "logits_scaling: must be a positive number, got logits_scaling=0"),
        (SEED_OSS | {"mlp_bias": True}, "attention_out_bias: cannot be converted"),
        (HELIUM | {"head_dim": 10}, "head_dim: cannot be converted, got head_dim=10: .*fill hidden_size=24"),
        (HELIUM, "head_dim: cannot be converted"),  # HeliumConfig's default is 128
        (HELIUM | {"head_dim": 4, "mlp_bias": True}, "mlp_bias: cannot be converted"),
    ],
)
def test_what_a_dense_family_cannot_say_is_refused(config, problem):
    with pytest.raises(ConversionError, match=problem):
        interpret_config(config)


def test_a_divisor_of_the_logits_comes_back_as_it_was():
    """1 / (1 / x) is not always x."""
    assert 1 / (1 / 49) != 49
    for divisor in (49.0, 8.0, 1.3, 13.0, 6.0, 0.37):
        assert find_divisor(1 / divisor) == divisor
    assert 1 / find_divisor(0.1234567890123) == pytest.approx(0.1234567890123, rel=1e-15)


def test_tiny_llm_zh_is_a_llama_with_biases_that_qwen2_computes():
    config = LLAMA | {
        "architectures": ["TinyllmForCausalLM"],
        "model_type": "tinyllm",
        "auto_map": {"AutoConfig": "configuration_tinyllm.TinyllmConfig", "AutoModelForCausalLM": "modeling_tinyllm.X"},
    }
    model = read_shape(config)
    assert (model.has_qkv_bias, model.has_linear_bias, model.num_query_groups) == (True, False, 6)
    assert select_family(model).hf_class == "Qwen2ForCausalLM"
    assert dataclasses.replace(model, has_qkv_bias=False) == read_shape(LLAMA)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_every_spelling_of_the_approximate_gelu_is_one(name):
    assert read_shape(GPT2 | {"activation_function": name}).activation == "gelu_tanh"
    assert read_shape(GPT2 | {"activation_function": "gelu"}).activation == "gelu_erf"


@pytest.mark.parametrize(
    "field",
    [{"rope_scaling": LLAMA3, "rope_theta": 5e5}, {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}],
    ids=["transformers 4", "transformers 5"],
)
def test_both_spellings_of_the_rope_scaling_are_read(field):
    model = read_shape(LLAMA | field)
    assert (model.rotary_base, model.rope_scaling) == (500_000, RopeScaling(factor=8.0))


def test_the_original_positions_of_yarn_are_those_of_transformers():
    """In the parameters, else the longest; a field of the config goes first, as Phi3's files have it."""
    for config in ({}, {"original_max_position_embeddings": 9}):
        for parameters in ({}, {"original_max_position_embeddings": 11}):
            yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **parameters}
            expected = transformers.LlamaConfig(max_position_embeddings=32, rope_parameters=dict(yarn), **config)
            expected.standardize_rope_params()  # as each model does again
            found = read_shape(LLAMA | config | {"rope_parameters": yarn}).rope_scaling
            name = "original_max_position_embeddings"
            assert getattr(found, name) == expected.rope_parameters[name]


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_positions_divided_are_read(kind):
    model = read_shape(LLAMA | {"rope_scaling": {kind: "linear", "factor": 4.0}})
    assert (model.rotary_seq_len_interpolation_factor, model.rope_scaling) == (4, None)
    assert read_shape(LLAMA | {"rope_scaling": {kind: "linear", "factor": 1.0}}) == read_shape(LLAMA)


@pytest.mark.parametrize(
    "config",
    [
        MISTRAL | {"sliding_window": None},
        MISTRAL | {"sliding_window": 32},
        MIXTRAL,
        QWEN2 | {"sliding_window": 8},
        QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
        QWEN3 | {"layer_types": ["full_attention"] * 3},
    ],
)
def test_a_window_as_long_as_the_positions_is_accepted(config):
    interpret_config(config)


# A change of the config, and what the refusal says: field, value, reason.
REFUSED = (
    ({"model_type": "gemma"}, ("model_type", "got model_type='gemma'", "one of ", "1 + weight")),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        ("architectures", "got architectures=['LlamaForSequenceClassification']", "must be LlamaForCausalLM"),
    ),
    ({"hidden_size": "24"}, ("hidden_size", "got hidden_size='24'", "positive whole number")),
    ({"rms_norm_eps": "x"}, ("rms_norm_eps", "got rms_norm_eps='x'", "number that is not negative")),
    ({"tie_word_embeddings": "no"}, ("tie_word_embeddings", "got tie_word_embeddings='no'", "true or false")),
    ({"hidden_size": 25}, ("hidden_size", "got hidden_size=25, heads=6", "multiple")),
    ({"num_key_value_heads": 4}, ("num_key_value_heads", "got num_key_value_heads=4", "num_attention_heads=6")),
    ({"hidden_act": "gelu"}, ("hidden_act", "got hidden_act='gelu'", "only silu, swish")),
    ({"attention_bias": True}, ("attention_bias", "got attention_bias=True", "mlp_bias differs")),
    ({"sliding_window": 16}, ("sliding_window", "got sliding_window=16", "max_position_embeddings=32")),  # of a Llama
    (
        {"rope_theta": 2e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ("rope_theta", "got rope_theta=20000.0", "rope_parameters says rope_theta=500000.0"),
    ),
    ({"rope_theta": 10**400}, ("rope_theta", "whole number")),
    ({"rms_norm_eps": 10**400}, ("rms_norm_eps", "number that is not negative")),
    ({"hidden_size": 10**30}, ("hidden_size", "positive whole number up to 2,147,483,647")),
    ({"rope_theta": 10000.5}, ("rope_theta", "got rope_theta=10000.5", "whole number", "--rotary-base")),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("rope_scaling", "got rope_scaling={'type': 'dynamic', 'factor': 2.0}", "llama3, linear or yarn"),
    ),
    (
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}},
        ("rope_scaling.low_freq_factor", "got low_freq_factor=2.0", "must be 1,"),
    ),
    (
        {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}},
        (
            "rope_scaling.original_max_position_embeddings",
            "got original_max_position_embeddings=32",
            "must be 8192,",
        ),
    ),
    (
        {"rope_scaling": LLAMA3 | {"factor": None}},
        ("rope_scaling.factor", "got factor=None", "number of at least 1"),
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
        ("rope_scaling.original_max_position_embeddings", "got original_max_position_embeddings=0"),
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.5}},
        ("rope_scaling.factor", "got factor=2.5", "whole number", "--rotary-seq-len-interpolation-factor"),
    ),
    ({"rope_interleaved": True}, ("rope_interleaved", "got rope_interleaved=True", "half a head apart")),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        ("layer_types", "got layer_types=['full_attention', 'sliding_attention']", "full attention"),
    ),
    (
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        ("auto_map", "got auto_map={'AutoModelForCausalLM': 'x.Y'}", "never run"),
    ),
    (
        {"quantization_config": {"bits": 4}},
        ("quantization_config", "got quantization_config={'bits': 4}", "quantized weights"),
    ),
    (
        {"partial_rotary_factor": 0.5},
        ("partial_rotary_factor", "got partial_rotary_factor=0.5", "every dimension of a head"),
    ),
    ({"num_local_experts": 8}, ("num_local_experts", "got num_local_experts=8", "without experts")),
)


@pytest.mark.parametrize("change, problem", REFUSED)
def test_a_field_that_cannot_be_converted_is_named(change, problem):
    with pytest.raises(ConversionError) as caught:
        interpret_config(LLAMA | change)
    field, *facts = problem
    assert_problems(caught.value.problems, (f"config.json, {field}:", *facts))


@pytest.mark.parametrize(
    "config, fields",
    [
        (LLAMA | {"mlp_bias": True}, ["attention_bias"]),
        (LLAMA | {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, ["rope_scaling"]),
        (
            LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
            ["rope_scaling.original_max_position_embeddings"],
        ),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters"]),
        (LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["rope_parameters"]),
        (MISTRAL | {"sliding_window": 0}, ["sliding_window"]),
        (MISTRAL | {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, ["layer_types"]),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, ["layer_types"]),  # switched off
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, ["layer_types"]),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, ["layer_types"]),
        (MIXTRAL | {"num_experts": 6}, ["num_local_experts"]),
        (MIXTRAL | {"num_experts_per_tok": 6}, ["num_experts_per_tok"]),
        (MIXTRAL | {"num_experts_per_tok": 1}, ["num_experts_per_tok"]),
        ({key: value for key, value in QWEN2.items() if key != "num_key_value_heads"}, ["num_key_value_heads"]),
        (QWEN3 | {"attention_bias": True}, ["attention_bias"]),
        (
            QWEN3_MOE | {"attention_bias": True, "use_sliding_window": True, "sliding_window": -8},
            ["sliding_window", "attention_bias"],
        ),
        (QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, ["mlp_only_layers"]),  # no experts are left
        (MIXTRAL | {"decoder_sparse_step": 2, "mlp_only_layers": [0]}, ["mlp_only_layers", "decoder_sparse_step"]),
        (GLM4_MOE | {"norm_topk_prob": False, "scoring_func": "softmax"}, ["norm_topk_prob", "scoring_func"]),
        (
            GLM4_MOE | {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
            ["num_experts_per_tok"],
        ),  # Megatron never divides a single score
        (GLM4_MOE | {"first_k_dense_replace": 3}, ["first_k_dense_replace"]),
        (GLM4_MOE | {"n_group": 4, "topk_group": 3}, ["topk_group"]),  # Megatron would take the best one of a group
        (GLM4_MOE | {"n_group": 5, "topk_group": 2}, ["topk_group"]),
        (GLM4_MOE | {"num_hidden_layers": 10**6}, ["num_hidden_layers"]),
        (HY_V3 | {"mlp_layer_types": ["dense", "sparse"]}, ["mlp_layer_types"]),
        (HY_V3 | {"mlp_layer_types": ["dense"] * 3, "n_group": 2}, ["mlp_layer_types", "n_group"]),
        (QWEN2_MOE | {"shared_expert_intermediate_size": None}, ["shared_expert_intermediate_size"]),
        (GPT2 | {"scale_attn_weights": False}, ["scale_attn_weights"]),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (GPT2 | {"activation_function": "relu", "n_embd": 25}, ["activation_function", "hidden_size"]),
        ({"model_type": "gpt2"}, ["n_embd", "n_head", "n_layer", "vocab_size", "n_positions"]),
    ],
)
def test_every_field_that_cannot_be_converted_is_named_at_once(config, fields):
    with pytest.raises(ConversionError) as caught:
        interpret_config(config)
    assert sorted(problem.removeprefix("config.json, ").split(":")[0] for problem in caught.value.problems) == sorted(
        fields
    )


@pytest.mark.parametrize("value", [True, -1, float("nan"), "x", [["x"]], {"a": 1}, 10**30], ids=repr)
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, QWEN2_MOE, GLM4_MOE, GPT2], ids=lambda config: config["model_type"])
def test_a_value_of_the_wrong_kind_is_a_users_error(config, value):
    """Never a stack trace: a file that somebody edited, or one that is no model's."""
    optional = (
        "head_dim",
        "num_key_value_heads",
        "rope_theta",
        "rope_scaling",
        "sliding_window",
        "layer_types",
        "auto_map",
    )
    refused = {name for name in (*config, *optional) if is_refused(config | {name: value})}
    assert {"model_type", "vocab_size"} - refused <= ({"vocab_size"} if value == 10**30 else set())


def is_refused(config) -> bool:
    try:
        interpret_config(config)
    except ConversionError:
        return True
    return False


def test_a_folder_without_a_readable_file_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"config\.json: must exist, got none"):
        read_hf_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json: content must be JSON, got: .* Fetch the file again\."):
        read_hf_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match=r"content must be a table, got \[.*\]\. Fetch the file again\."):
        read_hf_model(tmp_path)


@pytest.mark.parametrize(
    "value, dtype", [("torch.float16", "float16"), ("bfloat16", "bfloat16"), ("auto", None), (None, None)]
)
def test_the_dtype_is_read(value, dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": value}))
    assert read_hf_model(tmp_path).dtype == dtype
