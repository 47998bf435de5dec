"""Megatron functions that load torch_dist checkpoints, wrapped where they fail on a checkpoint that is in order.

Installed by `megatron_compat.install`; nothing else calls this module.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
