"""Megatron's saved arguments become a ModelShape; all arguments that no mapping expresses are named at once."""

import argparse

import pytest

from megatron_hammer.checkpoint.hugging_face.saved_model import read_saved_model
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import RopeScaling
from tests.helpers.toy_model import GPT2_ARGUMENTS, MOE_ARGUMENTS, toy_arguments


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


def test_leading_dense_layers_are_refused():
    arguments = toy_arguments(**MOE_ARGUMENTS | {"moe_layer_freq": [0, 1, 1]})
    with pytest.raises(ConversionError, match=r"moe_layer_freq=\[0, 1, 1\]"):
        read_saved_model(arguments)
    assert read_saved_model(toy_arguments(**MOE_ARGUMENTS | {"moe_layer_freq": [1, 1, 1]})).moe


def test_all_arguments_that_no_mapping_expresses_are_named_at_once():
    arguments = toy_arguments(qk_l2_norm=True, rotary_percent=0.5, multi_latent_attention=True, mtp_num_layers=1)
    with pytest.raises(ConversionError) as caught:
        read_saved_model(arguments)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "qk_l2_norm",
        "rotary_percent",
        "multi_latent_attention",
        "mtp_num_layers",
    }
    assert "got rotary_percent=0.5: Llama rotates every dimension of a head" in str(caught.value)


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

    from megatron_hammer.checkpoint.hugging_face.saved_model import _EXPRESSIBLE

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    defaults = {action.dest: action.default for action in parser._actions}
    refused = {
        name: defaults[name]
        for name, (is_expressible, _) in _EXPRESSIBLE.items()
        if name in defaults and not is_expressible(defaults[name])
    }
    assert refused == {}
    assert set(_EXPRESSIBLE) - set(defaults) == set()


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
