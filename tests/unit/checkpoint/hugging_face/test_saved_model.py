"""Megatron's saved arguments become a ModelShape; all arguments that no mapping expresses are named at once."""

import argparse

import pytest

from megatron_hammer.checkpoint.hugging_face.argument_effects import EXPRESSIBLE, is_known
from megatron_hammer.checkpoint.hugging_face.families.catalogue import select_family
from megatron_hammer.checkpoint.hugging_face.saved_model import has_zero_centered_norms, read_saved_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import RopeScaling, YarnScaling
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, PLAIN_MOE_ARGUMENTS, toy_arguments


def test_llama_is_read():
    model = read_saved_model(toy_arguments())
    assert (model.num_query_groups, model.head_dim, model.vocab_size) == (2, 4, 53)
    assert model.activation == "swiglu"
    assert not model.has_tied_embeddings
    assert model.moe is None


def test_without_grouped_queries_every_head_is_a_group():
    # Megatron's own default of --num-query-groups is 1, which means nothing without --group-query-attention.
    assert read_saved_model(toy_arguments(group_query_attention=False, num_query_groups=1)).num_query_groups == 6


def test_the_vocabulary_may_be_given_or_left_padded():
    assert read_saved_model(toy_arguments(), vocab_size=50).vocab_size == 50
    assert read_saved_model(toy_arguments(vocab_size=None)).vocab_size == 64
    with pytest.raises(ConversionError, match="vocab_size: the checkpoint's arguments must hold it"):
        read_saved_model(toy_arguments(vocab_size=None, padded_vocab_size=None))


@pytest.mark.parametrize("fusion, activation", [(True, "gelu_tanh"), (False, "gelu_erf")])
def test_gelu_is_the_approximation_only_where_megatron_fuses_it(fusion, activation):
    arguments = toy_arguments(**GPT2_ARGUMENTS | {"bias_gelu_fusion": fusion})
    assert read_saved_model(arguments).activation == activation


def test_experts_are_read():
    model = read_saved_model(toy_arguments(**MOE_ARGUMENTS))
    assert (model.moe.num_experts, model.moe.router_topk, model.moe.ffn_hidden_size) == (5, 2, 12)
    assert model.moe.is_topk_renormalized
    pre_softmax = read_saved_model(toy_arguments(**MOE_ARGUMENTS | {"moe_router_pre_softmax": True}))
    assert not pre_softmax.moe.is_topk_renormalized


def test_dense_layers_among_mixtures_are_read():
    mixed = read_saved_model(toy_arguments(**MOE_ARGUMENTS | {"moe_layer_freq": [0, 1, 1]}))
    assert mixed.moe.dense_layers == (0,)
    for wrong in ([0, 1], [0, 0, 0], [0, 1, 2], 0, "[1]*3"):
        arguments = toy_arguments(**MOE_ARGUMENTS | {"moe_layer_freq": wrong})
        with pytest.raises(ConversionError, match=r"moe_layer_freq: must be .* a 0 or a 1 for each layer"):
            read_saved_model(arguments)
    assert read_saved_model(toy_arguments(**MOE_ARGUMENTS | {"moe_layer_freq": [1, 1, 1]})).moe


def test_all_arguments_that_no_mapping_expresses_are_named_at_once():
    arguments = toy_arguments(qk_l2_norm=True, rotary_interleaved=True, multi_latent_attention=True, mtp_num_layers=1)
    with pytest.raises(ConversionError) as caught:
        read_saved_model(arguments)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "qk_l2_norm",
        "rotary_interleaved",
        "multi_latent_attention",
        "mtp_num_layers",
    }
    assert "got rotary_interleaved=True: transformers rotates halves, not neighbouring pairs" in str(caught.value)


MUP = {
    "use_mup": True,
    "mup_base_hidden_size": 12,
    "mup_base_head_dim": None,
    "mup_embedding_mult": 10.0,
    "mup_output_mult": 1.0,
    "mup_attn_scale_power": 1.0,
}


def test_a_run_of_mup_is_a_granite_and_nothing_else():
    """Its multipliers, from what Megatron derives; a class without a field for one is refused by the field's name."""
    model = read_saved_model(toy_arguments(**MUP))
    assert (model.embedding_multiplier, model.attention_scale, model.logits_multiplier) == (10.0, 1 / 4, 0.5)
    assert select_family(model).hf_class == "GraniteForCausalLM"
    like_any_other = MUP | {"mup_base_hidden_size": None, "mup_embedding_mult": 1.0, "mup_attn_scale_power": 0.5}
    assert read_saved_model(toy_arguments(**like_any_other)) == read_saved_model(toy_arguments())
    for change, nearest in (({"add_qkv_bias": True}, "Qwen2"), ({"qk_layernorm": True}, "Qwen3"), (MOE_ARGUMENTS, "")):
        model = read_saved_model(toy_arguments(**MUP | change))
        with pytest.raises(
            ConversionError, match=f"attention_scale=0.25, embedding_multiplier=10.0.*{nearest}.*no such field"
        ):
            select_family(model)


def test_layers_without_a_rope_and_turned_shares_choose_their_class():
    assert select_family(read_saved_model(toy_arguments(no_rope_freq=3))).hf_class == "SmolLM3ForCausalLM"
    assert select_family(read_saved_model(toy_arguments(rotary_percent=0.5))).hf_class == "Phi3ForCausalLM"
    with pytest.raises(ConversionError, match=r"layers_without_rope=\(2,\), rotary_percent=0.5"):
        select_family(read_saved_model(toy_arguments(no_rope_freq=3, rotary_percent=0.5)))


def test_windows_and_yarn_choose_their_class_or_are_refused_by_name():
    everywhere, some = {"window_size": (7, 0)}, {"window_size": [7, 0], "window_attn_skip_freq": 2}
    window = read_saved_model(toy_arguments(**some)).sliding_window
    assert (window.num_tokens, window.layers) == (8, (0, 2))
    assert select_family(read_saved_model(toy_arguments(**everywhere))).hf_class == "MistralForCausalLM"
    assert select_family(read_saved_model(toy_arguments(**some))).hf_class == "MinistralForCausalLM"
    plain = read_saved_model(toy_arguments())
    assert select_family(plain, preferred="mistral").model_type == "mistral"
    # transformers' Ministral makes the mask of a window in every model, and fails where there is none.
    assert select_family(plain, preferred="ministral").model_type == "llama"
    with pytest.raises(ConversionError, match="a sliding window in some layers: the class has one in every layer"):
        select_family(read_saved_model(toy_arguments(**some, **PLAIN_MOE_ARGUMENTS)))
    with pytest.raises(ConversionError, match=r"sliding_window=.*no such field"):
        select_family(read_saved_model(toy_arguments(**everywhere, **GPT2_ARGUMENTS)))
    for value in ((7, 1), (-1, 0), 7, (7,), ("7", "0")):
        with pytest.raises(ConversionError, match=r"^window_size: cannot be exported, got window_size="):
            read_saved_model(toy_arguments(window_size=value))
    with pytest.raises(ConversionError, match=r"^window_attn_skip_freq: .*neither a number nor a list of 0 and 1"):
        read_saved_model(toy_arguments(window_size=(7, 0), window_attn_skip_freq=[[1], 0, 2]))
    yarn = {"position_embedding_type": "yarn", "use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 3}
    model = read_saved_model(toy_arguments(**yarn, rotary_scaling_factor=4.0))
    assert (model.rope_scaling, model.rotary_seq_len_interpolation_factor) == (
        YarnScaling(factor=4.0, original_max_position_embeddings=4096),
        None,
    )
    with pytest.raises(ConversionError, match=r"^yarn_beta_fast: must be a number, got yarn_beta_fast='x'"):
        read_saved_model(toy_arguments(**yarn, yarn_beta_fast="x"))


def test_an_export_has_the_class_of_its_source_while_that_computes_it():
    plain = read_saved_model(toy_arguments())
    for name in ("helium", "phi3", "granite", "smollm3", "seed_oss"):
        assert select_family(plain, preferred=name).model_type == name
    assert select_family(plain, preferred="gemma").model_type == "llama"
    # Upcycled, a Helium has experts; no dense class computes them.
    mixture = read_saved_model(toy_arguments(**PLAIN_MOE_ARGUMENTS))
    for name in ("helium", "phi3", "llama", "qwen3"):
        assert select_family(mixture, preferred=name).model_type == "mixtral"


@pytest.mark.parametrize(
    "name, value",
    [
        ("glu_linear_offset", 1.0),
        ("linear_attention_freq", 4),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]),
        ("moe_router_force_load_balancing", True),
        ("moe_mlp_glu_interleave_size", 32),
        ("moe_expert_rank_capacity_factor", 2.0),
    ],
)
def test_arguments_that_change_the_computation_are_refused(name, value):
    with pytest.raises(ConversionError, match=f"^{name}: cannot be exported, got {name}="):
        read_saved_model(toy_arguments(**MOE_ARGUMENTS, **{name: value}))
    read_saved_model(toy_arguments(**MOE_ARGUMENTS, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"]))


def test_megatrons_defaults_are_expressible():
    """A list of refusals that refuses what nobody asked for would stop every export."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    defaults = {action.dest: action.default for action in parser._actions}
    refused = {
        name: defaults[name]
        for name, (is_expressible, _) in EXPRESSIBLE.items()
        if name in defaults and not is_expressible(defaults[name])
    }
    assert refused == {}
    of_older_versions = {"hybrid_attention_ratio", "hybrid_mlp_ratio", "retro_add_retriever", "modelopt_enabled"}
    assert set(EXPRESSIBLE) - set(defaults) == of_older_versions
    # By construction: an argument of the installed Megatron that is in no part of the table fails here.
    assert [name for name in defaults if not is_known(name)] == []


def test_norms_of_queries_and_keys_and_heads_of_any_width_are_read():
    model = read_saved_model(toy_arguments(qk_layernorm=True, kv_channels=10))
    assert (model.has_qk_norm, model.head_dim) == (True, 10)
    assert not read_saved_model(toy_arguments()).has_qk_norm


def test_our_training_builds_the_rope_with_the_factor_asked_for_and_megatrons_own_with_8():
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
    assert read_saved_model(toy_arguments(**scaled)).rope_scaling == RopeScaling(factor=32.0)
    assert read_saved_model(toy_arguments(rope_scaling_factor=32.0)).rope_scaling is None
    plain_megatron = toy_arguments(use_rope_scaling=True, rope_scaling_factor=8.0)
    del plain_megatron.embedding_norm
    assert read_saved_model(plain_megatron).rope_scaling == RopeScaling()
    plain_megatron.rope_scaling_factor = 32.0
    with pytest.raises(
        ConversionError,
        match=r"^rope_scaling_factor: must be 8, with which.*got rope_scaling_factor=32.*--rope-scaling-factor",
    ):
        read_saved_model(plain_megatron)


def test_a_rope_is_scaled_in_one_way():
    assert (
        read_saved_model(toy_arguments(rotary_seq_len_interpolation_factor=4)).rotary_seq_len_interpolation_factor == 4
    )
    assert read_saved_model(toy_arguments(rotary_seq_len_interpolation_factor=1)) == read_saved_model(toy_arguments())
    with pytest.raises(
        ConversionError,
        match=r"^rotary_seq_len_interpolation_factor: .*together with use_rope_scaling, got .*=4\b",
    ):
        read_saved_model(toy_arguments(rotary_seq_len_interpolation_factor=4, use_rope_scaling=True))


def test_the_gate_of_an_absent_shared_expert_is_ignored():
    arguments = toy_arguments(**MOE_ARGUMENTS | {"moe_shared_expert_intermediate_size": None})
    assert not read_saved_model(arguments).moe.has_shared_expert_gate


# --- older versions of Megatron --------------------------------------------------------------------------------------

# What each version's namespace lacks, of what the model needs. Source: arguments.py of these versions.
SINCE = {
    "0.8": ["rotary_base", "moe_router_pre_softmax"],
    "0.10": ["moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "use_rope_scaling"],
    "0.11": ["rope_scaling_factor", "moe_router_score_function"],
    "0.16": ["moe_shared_expert_gate", "layernorm_zero_centered_gamma", "layernorm_epsilon", "embedding_norm"],
}


def older_arguments(version: str, **changes) -> argparse.Namespace:
    """The toy's arguments as that version of megatron-core saved them: `norm_epsilon`, no gate of the shared expert."""
    arguments = toy_arguments(norm_epsilon=1e-6, apply_layernorm_1p=False, **changes)
    for since, names in SINCE.items():
        if float(since[2:]) > float(version[2:]):
            for name in names:
                vars(arguments).pop(name, None)
    return arguments


@pytest.mark.parametrize("version", ["0.6", "0.8", "0.10", "0.11", "0.15"])
@pytest.mark.parametrize("is_moe", [False, True], ids=["dense", "experts"])
def test_every_version_is_read(version, is_moe):
    changes = MOE_ARGUMENTS | {"moe_shared_expert_gate": False, "moe_shared_expert_intermediate_size": None}
    changes |= {"moe_ffn_hidden_size": 20}  # as wide as the MLP, the only width before 0.10
    model = read_saved_model(older_arguments(version, **(changes if is_moe else {})))
    today = read_saved_model(toy_arguments(layernorm_epsilon=1e-6, **(changes if is_moe else {})))
    assert model == today
    assert model.norm_epsilon == 1e-6  # not the default of today's name


def test_the_norms_of_apply_layernorm_1p_are_noticed_under_both_names():
    assert has_zero_centered_norms(older_arguments("0.15", **{})) is False
    arguments = older_arguments("0.15")
    arguments.apply_layernorm_1p = True
    assert has_zero_centered_norms(arguments)
    assert has_zero_centered_norms(toy_arguments(layernorm_zero_centered_gamma=True))


def test_a_set_argument_that_no_table_knows_is_refused_by_name_unless_it_is_ignored():
    fork = toy_arguments(logit_soft_cap=30.0, patch_switch=False, patch_name="", patch_list=[], patch_none=None)
    with pytest.raises(ConversionError, match=r"^logit_soft_cap: .*got logit_soft_cap=30.*--ignore-arguments logit_"):
        read_saved_model(fork)
    assert read_saved_model(fork, ignored=["logit_soft_cap"]) == read_saved_model(toy_arguments())
    with pytest.raises(ConversionError, match=r"^ignore-arguments: .*got seed\. Drop it"):
        read_saved_model(toy_arguments(), ignored=["seed"])


@pytest.mark.parametrize("value", [None, "24", 0, True])
def test_sizes_that_are_missing_or_no_numbers_are_one_sentence(value):
    with pytest.raises(ConversionError, match=rf"^arguments: must hold the sizes .*hidden_size={value!r}"):
        read_saved_model(toy_arguments(hidden_size=value))


def test_what_our_training_notes_in_the_arguments_is_known():
    assert read_saved_model(toy_arguments(is_sft=True, imported_from="hf")) == read_saved_model(toy_arguments())
