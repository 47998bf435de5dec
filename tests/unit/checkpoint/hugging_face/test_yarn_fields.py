"""What is read of YaRN's fields makes Megatron turn as transformers does, whatever the file says, and comes back."""

import itertools

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_hammer.checkpoint.hugging_face.yarn_fields import read_yarn, write_yarn
from megatron_hammer.model.shape import YarnScaling
from megatron_hammer.platforms import megatron_compat

BASE = {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 40}
# Of each field what changes the function and what is the same as leaving it out; every pair is tried.
CHANGES = (
    {"factor": 1.0},
    {"factor": 2.5},
    {"original_max_position_embeddings": 4096},
    {"beta_fast": 7},
    {"beta_fast": None, "beta_slow": 0},
    {"beta_slow": 0.3},
    {"truncate": False},
    {"mscale": 0.7},
    {"mscale_all_dim": 0.6},
    {"mscale": 0.7, "mscale_all_dim": 0.6},
    {"mscale": 1.0, "mscale_all_dim": 0},
    {"attention_factor": None},
    {"attention_factor": 1.0},
    {"attention_factor": 0.4, "factor": 3.0},
    {"attention_factor": 2, "factor": 3.0},
)
THETA, HEAD_DIM = 5000, 22


def read(parameters):
    positions = parameters["original_max_position_embeddings"]
    scaling, problems = read_yarn(parameters, original_positions=positions, rope_theta=THETA)
    assert problems == []
    return scaling


def turn_by_transformers(parameters):
    """(frequencies [d/2], factor) of transformers' own function."""
    config = transformers.LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        rope_parameters={**parameters, "rope_theta": float(THETA)},
        max_position_embeddings=240,
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config)


def turn_by_megatron(scaling: YarnScaling):
    """The same of the class that Megatron's GPTModel builds."""
    megatron_compat.install("cpu")
    from megatron.core.models.common.embeddings import YarnRotaryEmbedding

    rope = YarnRotaryEmbedding(
        HEAD_DIM,
        rotary_base=THETA,
        scaling_factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        mscale=scaling.mscale,
        mscale_all_dim=scaling.mscale_all_dim,
        correction_range_round_to_int=scaling.has_whole_bounds,
    )
    angles, factor = rope.get_emb(2)
    return angles[1, 0, 0, : HEAD_DIM // 2], factor


def list_parameters():
    for changes in itertools.combinations_with_replacement(CHANGES, 2):
        parameters = BASE | changes[0] | changes[1]
        if parameters["factor"] > 1 or parameters.get("attention_factor") in (None, 1.0):
            yield parameters


def test_megatron_turns_as_transformers_does() -> None:
    seen = []
    for parameters in list_parameters():
        scaling = read(parameters)
        frequencies, factor = turn_by_transformers(parameters)
        ours, our_factor = turn_by_megatron(scaling)
        torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
        assert our_factor == pytest.approx(factor, rel=1e-15)
        assert scaling.attention_factor == our_factor
        seen.append((ours.tolist(), round(our_factor, 12)))
    assert len({str(turns) for turns in seen}) > 20  # the sweep reaches different functions


def test_what_is_written_is_the_same_function() -> None:
    for parameters in list_parameters():
        scaling = read(parameters)
        again = read(write_yarn(scaling))
        assert turn_by_transformers(write_yarn(scaling))[1] == pytest.approx(scaling.attention_factor, rel=1e-15)
        assert torch.equal(turn_by_megatron(again)[0], turn_by_megatron(scaling)[0])


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"factor": None}, "factor", "number of at least 1"),
        ({"factor": 0.5}, "factor", "number of at least 1"),
        ({"beta_fast": 1, "beta_slow": 2}, "beta_fast", "at least beta_slow=2"),
        ({"beta_fast": "x"}, "beta_fast", "at least beta_slow"),
        ({"mscale": -1.0}, "mscale", "not negative"),
        ({"attention_factor": 0}, "attention_factor", "above 0"),
        ({"attention_factor": float("nan")}, "attention_factor", "not negative"),
        ({"attention_factor": 1.5, "factor": 1.0}, "attention_factor", "1 or null beside factor=1"),
        ({"truncate": 1}, "truncate", "true or false"),
        ({"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta", "left out"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings", "positive whole number"),
    ],
)
def test_a_field_that_megatron_computes_otherwise_is_named(change, field, expected) -> None:
    parameters = BASE | change
    positions = parameters["original_max_position_embeddings"]
    scaling, problems = read_yarn(parameters, original_positions=positions, rope_theta=THETA)
    assert scaling is None
    assert [name for name, _ in problems] == [field]
    assert expected in problems[0][1]
    assert read_yarn(BASE, original_positions=40, rope_theta=1)[1][0][0] == "rope_theta"
