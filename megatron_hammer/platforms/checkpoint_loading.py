"""Megatron functions that load torch_dist checkpoints, wrapped where they fail on a checkpoint that is in order.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RATES = ("max_lr", "min_lr")  # of a parameter group
EXTRA_STATE = "_extra_state"  # TransformerEngine's modules keep their fp8 scales under this name


def skip_strides(load_tensors_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap TorchDistLoadShardedStrategy.load_tensors_metadata, which passes every recorded property to torch.empty.

    torch 2.15 records `strides` too, and torch.empty has no such argument.
    """

    @functools.wraps(load_tensors_metadata)
    def load(self: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = metadata or FileSystemReader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                vars(entry.properties).pop("strides", None)
        return load_tensors_metadata(self, checkpoint_dir, metadata)

    return load


def keep_missing_extra_states(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap dist_checkpointing.load: an extra state that the checkpoint lacks stays what the new module says it is.

    The `torch` backend, the converters from Hugging Face and other trainers write none. Megatron asks for one for each
    of TransformerEngine's modules and stops at the first that is missing. In bf16 they are empty.
    """

    @functools.wraps(load)
    def load_what_is_there(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
        from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
        from torch.distributed.checkpoint import FileSystemReader

        def is_extra_state(value: Any) -> bool:
            return isinstance(value, ShardedObject) and value.key.endswith(EXTRA_STATE)

        # Reading the metadata takes time for a large checkpoint; a module without extra states does not need it.
        if extract_matching_values(sharded_state_dict, is_extra_state)[0]:
            stored = set(FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata)

            def keep(value: Any) -> Any:
                is_missing = is_extra_state(value) and value.unique_key not in stored
                return LocalNonpersistentObject(value.data) if is_missing else value

            dict_list_map_inplace(keep, sharded_state_dict)
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load_what_is_there


def load_under_own_rates(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DistributedOptimizer.load_state_dict as `match_under_own_rates` wraps what the other optimizers call."""

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> Any:
        saved = state_dict.get("optimizer", {}).get("param_groups", [])
        _take_own_rates(saved, self.optimizer.param_groups)
        return load_state_dict(self, state_dict)

    return load


def match_under_own_rates(filter_and_reorder: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap MegatronOptimizer._filter_and_reorder_param_groups: groups get the run's rates before they are compared."""

    @functools.wraps(filter_and_reorder)
    def match(current_groups: Any, state_dict_groups: Any) -> Any:
        _take_own_rates(state_dict_groups, current_groups)
        return filter_and_reorder(current_groups, state_dict_groups)

    return match


def _take_own_rates(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> None:
    """Write the run's learning rates into the groups of a checkpoint; preflight has seen that a flag asks for it.

    Groups that only their rates tell apart, as those of --use-mup, are paired in the order of their rates: these are
    fixed multiples of --lr. Other numbers of groups are left to Megatron, which refuses them.
    """
    saved_by_kind, own_by_kind = _sort_by_kind(saved), _sort_by_kind(own)
    for kind, groups in saved_by_kind.items():
        if len(groups) == len(own_by_kind[kind]):
            for group, own_group in zip(groups, own_by_kind[kind], strict=True):
                group.update({name: own_group[name] for name in RATES if name in own_group})


def _sort_by_kind(groups: Sequence[dict[str, Any]]) -> defaultdict[tuple[Any, ...], list[dict[str, Any]]]:
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    by_kind = defaultdict(list)
    for group in groups:
        kind = (group.get(name, group.get(f"pre_{name}")) for name in param_group_identifier_keys if name not in RATES)
        by_kind[tuple(kind)].append(group)
    for same in by_kind.values():
        same.sort(key=lambda group: [group.get(name) or 0.0 for name in RATES])
    return by_kind
