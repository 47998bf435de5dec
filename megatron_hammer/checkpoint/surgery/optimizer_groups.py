"""The optimizer's parameter groups where experts are parallelised as the other weights are, and where they are not.

With expert parallelism, or a tensor-parallel size of their own, megatron gives the experts' parameters an optimizer of
their own and chains the two: the common state holds {0: dense, 1: experts}. Otherwise one optimizer has them all. The
tensors are stored alike; only this part of the common state keeps a checkpoint of one kind from resuming as the other.
Muon and Lion, which leave embeddings and vectors to Adam, are chained in both cases: {0: matrices, 1: the rest}, or
{0: dense matrices, 1: matrices of experts, 2: the rest}.
Source: megatron.core.optimizer.get_megatron_optimizer, ChainedOptimizer.load_state_dict.
"""

import copy
from typing import Any

from megatron_hammer.errors import CheckpointError

_STEP_FIELDS = ("step", "lr")


def has_expert_optimizer(state: dict[Any, Any]) -> bool:
    """Whether the experts have an optimizer of their own."""
    return any(map(_is_of_experts, _list_chained(state)))


def merge_expert_optimizer(state: dict[Any, Any]) -> dict[Any, Any]:
    """{0: dense, 1: experts} to one optimizer with all parameters, as megatron has without expert parallelism.

    Inverse of `split_expert_optimizer`. Raises CheckpointError if the two are at different steps or learning rates.
    """
    chained = _list_chained(copy.deepcopy(state))
    dense = [one for one in chained if not _is_of_experts(one)]
    problems = []
    for experts in chained:
        if _is_of_experts(experts):
            problems += _join(_find_twin(experts, dense), experts)
    if problems:
        raise CheckpointError(*problems)
    return dense[0] if len(dense) == 1 else dict(enumerate(dense))


def split_expert_optimizer(state: dict[Any, Any], *, has_expert_vectors: bool) -> dict[Any, Any]:
    """One optimizer to {0: dense, 1: experts}, as megatron has with expert parallelism.

    has_expert_vectors: whether experts have biases, which like all vectors are in a group without weight decay.
    """
    chained = _list_chained(copy.deepcopy(state))
    if any(map(_is_of_experts, chained)):
        return dict(enumerate(chained))
    # The first has the matrices, those of the experts too: of Muon's chain the second is Adam.
    experts = copy.deepcopy(chained[0])
    groups = _groups_of(experts)
    matrices = [group for group in groups if group.get("wd_mult", 1.0) != 0.0 and _has_own_rate_of_all(group, groups)]
    vectors = [group for group in groups if group.get("wd_mult", 1.0) == 0.0 and _has_own_rate_of_all(group, groups)]
    # In place: `groups` is the list inside the copied state.
    groups[:] = matrices + (vectors if has_expert_vectors else [])
    for group in groups:
        group["is_expert_parallel"] = True
    return dict(enumerate([chained[0], experts, *chained[1:]]))


def _list_chained(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """The optimizers of a chain in their order, or the only one."""
    is_chain = bool(state) and all(isinstance(key, int) for key in state)
    return [state[key] for key in sorted(state)] if is_chain else [state]


def _is_of_experts(state: dict[Any, Any]) -> bool:
    return all(group.get("is_expert_parallel") for group in _groups_of(state))


def _find_twin(experts: dict[Any, Any], dense: list[dict[Any, Any]]) -> dict[Any, Any]:
    """The optimizer of the dense parameters that the experts' belong to without expert parallelism.

    Raises CheckpointError where several are of the same kind.
    """
    if len(dense) == 1:
        return dense[0]
    kinds = [{group.get("optimizer") for group in _groups_of(one)} for one in (experts, *dense)]
    twins = [one for one, kind in zip(dense, kinds[1:], strict=True) if kind & kinds[0]]
    if len(twins) != 1:
        # With that flag megatron divides the dense parameters between several chained optimizers as well.
        raise CheckpointError(
            f"optimizer: must be one of the dense parameters and one of the experts', got {len(dense) + 1} chained. "
            "Save the checkpoint without --overlap-param-gather-with-optimizer-step."
        )
    return twins[0]


def _join(dense: dict[Any, Any], experts: dict[Any, Any]) -> list[str]:
    """Add the groups that only the experts have; returns a problem for every number that differs in the others."""
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
    return problems


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
