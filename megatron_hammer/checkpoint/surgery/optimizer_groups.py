"""The optimizer's parameter groups where experts are parallelised as the other weights are, and where they are not.

With expert parallelism, or a tensor-parallel size of their own, megatron gives the experts' parameters an optimizer of
their own and chains the two: the common state holds {0: dense, 1: experts}. Otherwise one optimizer has them all. The
tensors are stored alike; only this part of the common state keeps a checkpoint of one kind from resuming as the other.
Source: megatron.core.optimizer.get_megatron_optimizer, ChainedOptimizer.load_state_dict.
"""

import copy
from typing import Any

from megatron_hammer.errors import CheckpointError

_STEP_FIELDS = ("step", "lr")


def is_chained(state: dict[Any, Any]) -> bool:
    """Whether the experts have an optimizer of their own."""
    return bool(state) and all(isinstance(key, int) for key in state)


def merge_expert_optimizer(state: dict[Any, Any]) -> dict[Any, Any]:
    """{0: dense, 1: experts} to one optimizer with all parameters, as megatron has without expert parallelism.

    Inverse of `split_expert_optimizer`. Raises CheckpointError if the two are at different steps or learning rates.
    """
    if not is_chained(state):
        return copy.deepcopy(state)
    # With that flag megatron divides the dense parameters between several chained optimizers as well.
    if sorted(state) != [0, 1]:
        raise CheckpointError(
            f"optimizer: must be one of the dense parameters and one of the experts', got {len(state)} chained. "
            "Save the checkpoint without --overlap-param-gather-with-optimizer-step."
        )
    dense, experts = copy.deepcopy(state[0]), state[1]
    problems = []
    for group in _groups_of(experts):
        twin = next((other for other in _groups_of(dense) if _identity(other) == _identity(group)), None)
        if twin is None:
            _groups_of(dense).append({**copy.deepcopy(group), "is_expert_parallel": False})
            continue
        # One group has one step and one learning rate; two that differ cannot become one.
        problems += [
            f"optimizer: {name} of the experts must be that of the other parameters, got {group.get(name)} and "
            f"{twin.get(name)}. Resume with expert parallelism."
            for name in _STEP_FIELDS
            if twin.get(name) != group.get(name)
        ]
    if problems:
        raise CheckpointError(*problems)
    return dense


def split_expert_optimizer(state: dict[Any, Any], *, has_expert_vectors: bool) -> dict[Any, Any]:
    """One optimizer to {0: dense, 1: experts}, as megatron has with expert parallelism.

    has_expert_vectors: whether experts have biases, which like all vectors are in a group without weight decay.
    """
    if is_chained(state):
        return copy.deepcopy(state)
    dense, experts = copy.deepcopy(state), copy.deepcopy(state)
    groups = _groups_of(experts)
    matrices = [group for group in groups if group.get("wd_mult", 1.0) != 0.0 and _has_own_rate_of_all(group, groups)]
    vectors = [group for group in groups if group.get("wd_mult", 1.0) == 0.0 and _has_own_rate_of_all(group, groups)]
    # In place: `groups` is the list inside the copied state.
    groups[:] = matrices + (vectors if has_expert_vectors else [])
    for group in groups:
        group["is_expert_parallel"] = True
    return {0: dense, 1: experts}


def _has_own_rate_of_all(group: dict[str, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether the group has the learning rate of the first group, which no flag overrides (megatron sorts them so).

    Only the embeddings and the head can have another learning rate (--decoupled-lr), never experts.
    """
    return all(group.get(name) == groups[0].get(name) for name in ("max_lr", "min_lr", "lr_mult", "is_decoupled_lr"))


def _groups_of(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The list itself, inside the state of the distributed optimizer, of mixed precision, or of fp32."""
    inner = state.get("optimizer", state)
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not groups:
        raise CheckpointError(
            f"optimizer: common state must hold param_groups, got {sorted(map(str, state))}. "
            "Save the checkpoint with megatron-core 0.19."
        )
    return groups


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """The fields by which megatron tells groups apart, without the flag of the experts."""
    names = ("max_lr", "min_lr", "wd_mult", "lr_mult", "is_decoupled_lr", "eps", "start_wd", "end_wd", "optimizer")
    return tuple(group.get(name) for name in names)
