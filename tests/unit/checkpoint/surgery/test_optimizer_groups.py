"""One optimizer and the two that megatron chains hold the same groups; splitting and merging are inverse operations."""

import copy
import re

import pytest

from megatron_hammer.checkpoint.surgery.optimizer_groups import merge_expert_optimizer, split_expert_optimizer
from megatron_hammer.errors import CheckpointError
from tests.helpers.toy_training_checkpoint import MATRIX_GROUP, VECTOR_GROUP, optimizer_state

FORMS = {
    "distributed": lambda groups: {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "x"},
    "mixed precision": lambda groups: {"optimizer": {"param_groups": groups}, "grad_scaler": {"scale": 2.0}},
    "fp32": lambda groups: {"param_groups": groups},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_experts_get_a_group_of_their_own(form):
    state = form([dict(MATRIX_GROUP), dict(VECTOR_GROUP)])
    before = copy.deepcopy(state)
    assert split_expert_optimizer(state, has_expert_vectors=False) == {
        0: before,
        1: form([{**MATRIX_GROUP, "is_expert_parallel": True}]),
    }
    assert state == before


def test_biases_of_experts_are_without_weight_decay():
    chained = split_expert_optimizer(optimizer_state(), has_expert_vectors=True)
    groups = chained[1]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["is_expert_parallel"]) for group in groups] == [(1.0, True), (0.0, True)]


def test_a_rate_of_the_embeddings_own_is_not_the_experts():
    state = optimizer_state()
    state["optimizer"]["param_groups"].append({**MATRIX_GROUP, "max_lr": 9.0, "is_decoupled_lr": True})
    assert split_expert_optimizer(state, has_expert_vectors=False)[1] == optimizer_state(is_chained=True)[1]


def test_splitting_and_merging_are_inverses():
    one, two = optimizer_state(), optimizer_state(is_chained=True)
    assert split_expert_optimizer(one, has_expert_vectors=False) == two
    assert merge_expert_optimizer(two) == one
    assert merge_expert_optimizer(one) == one
    assert split_expert_optimizer(two, has_expert_vectors=False) == two


def test_of_optimizers_chained_by_kind_the_one_of_the_matrices_has_the_experts():
    """As Muon and Lion are, which leave embeddings and norms to Adam."""
    matrices = {"param_groups": [dict(MATRIX_GROUP)]}
    others = {"param_groups": [{**MATRIX_GROUP, "optimizer": "adam"}, {**VECTOR_GROUP, "optimizer": "adam"}]}
    experts = {"param_groups": [{**MATRIX_GROUP, "is_expert_parallel": True}]}
    one, two = {0: matrices, 1: others}, {0: matrices, 1: experts, 2: others}
    assert split_expert_optimizer(one, has_expert_vectors=False) == two
    assert merge_expert_optimizer(two) == one
    assert merge_expert_optimizer(one) == one
    assert split_expert_optimizer(two, has_expert_vectors=False) == two


def test_two_optimizers_at_different_steps_are_not_merged():
    state = optimizer_state(is_chained=True)
    state[1]["optimizer"]["param_groups"][0] |= {"step": 9, "lr": 0.2}
    with pytest.raises(
        CheckpointError, match=r"step of the experts must be that of the other parameters, got 9 and 10\b"
    ):
        merge_expert_optimizer(state)
    assert split_expert_optimizer(state, has_expert_vectors=False) == state


def test_other_chains_and_states_without_groups_are_named():
    state = optimizer_state(is_chained=True)
    state[2] = state[0]
    text = "optimizer: must be one of the dense parameters and one of the experts', got 3 chained."
    with pytest.raises(CheckpointError, match=re.escape(text)):
        merge_expert_optimizer(state)
    with pytest.raises(CheckpointError, match=r"common state must hold param_groups, got \['state'\]"):
        split_expert_optimizer({"state": {}}, has_expert_vectors=False)
