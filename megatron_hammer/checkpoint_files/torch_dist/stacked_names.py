"""From the name of one layer's tensor to the key under which torch_dist keeps it, with all layers in one tensor.

The inverse of how `reader.py` names them. Megatron stacks the experts of a layer, and the layers of a model unless it
has both dense layers and mixtures of experts. Source: TransformerBlock.sharded_state_dict (0.19.2).
"""

import re
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^(decoder\.layers)\.(\d+)\.")
_EXPERT = re.compile(r"(\.mlp\.experts\.experts)\.(\d+)\.")
# The same parts of a key, where the layers or experts are stacked.
_STACKS = (re.compile(r"^(decoder\.layers)\.(?!\d)"), re.compile(r"(\.mlp\.experts\.experts)\.(?!\d)"))
# Modules that keep a state beside their weights (TransformerEngine's fp8 scales), which may be empty but must be there.
_STATEFUL = re.compile(r"(.*\.(?:linear_\w+|\w+_layernorm))\.(?:layer_norm_)?weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedName:
    """A tensor's key, and which of the stacked layers and experts it is: one index for each leading axis."""

    key: str
    indices: tuple[int, ...]


def stacks_layers(args: Any) -> bool:
    """Whether Megatron keeps the layers of the model of these arguments in one tensor: a list is not looked into."""
    frequency = getattr(args, "moe_layer_freq", 1)
    return isinstance(frequency, int) and frequency <= 1


def stack_name(name: str, *, has_layer_axis: bool = True) -> StackedName:
    """`decoder.layers.3.mlp.linear_fc1.weight` is number 3 of `decoder.layers.mlp.linear_fc1.weight`.

    has_layer_axis: False for a model of which each layer has keys of its own; its experts are stacked all the same.
    """
    indices = []
    for pattern in (_LAYER, _EXPERT) if has_layer_axis else (_EXPERT,):
        if found := pattern.search(name):
            indices.append(int(found[2]))
            name = name[: found.start()] + found[1] + "." + name[found.end() :]
    return StackedName(key=name, indices=tuple(indices))


def split_stack(key: str) -> tuple[str, int]:
    """(the name of one layer's tensor with {} for its numbers, how many leading axes are stacked) of a key."""
    num_stacked = 0
    for pattern in _STACKS:
        key, num_found = pattern.subn(r"\1.{}.", key)
        num_stacked += num_found
    return key, num_stacked


def extra_state_key(name: str, *, num_layers: int, num_experts: int, has_layer_axis: bool = True) -> str | None:
    """The key of the module's extra state, where the module of the tensor `name` has one.

    Megatron's ShardedObject.unique_key: `<module>._extra_state/shard_<indices>_<sizes of the stacked axes>`.
    """
    stacked = stack_name(name, has_layer_axis=has_layer_axis)
    module = _STATEFUL.fullmatch(stacked.key)
    if module is None:
        return None
    # A module outside the layers counts as one of one: megatron.core.transformer.utils._get_extra_state_offsets.
    axes = (num_layers, num_experts) if has_layer_axis else (num_experts,)
    sizes = axes[: len(stacked.indices)] or (1,)
    at = ".".join(map(str, stacked.indices or (0,)))
    return f"{module[1]}._extra_state/shard_{at}_{'.'.join(map(str, sizes))}"
