"""Fills the model chunks of one rank with stored weights, at any parallel layout, one parameter at a time.

The model's own `sharded_state_dict`, which also writes and reads checkpoints, says which part of which global tensor a
parameter is. The source, an opened Hugging Face folder or checkpoint, has the global tensors. Nothing is written to
disk.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.checkpoint_reader import VOCABULARY_TENSORS
from megatron_hammer.checkpoint_files.torch_dist.stacked_names import split_stack
from megatron_hammer.errors import ConversionError


class WeightPair(Protocol):
    """One Megatron tensor of a source; hf_names: what it is made of there, for messages."""

    @property
    def megatron_name(self) -> str: ...
    @property
    def hf_names(self) -> Sequence[str]: ...
    @property
    def num_elements(self) -> int: ...


class WeightSource[P: WeightPair](Protocol):
    """Where weights are read: an HfFolder, or a checkpoint of Megatron (evaluation/scorers/megatron.py)."""

    @property
    def folder(self) -> Path: ...
    @property
    def pairs(self) -> Sequence[P]: ...
    def read_pair(self, pair: P) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MasterWeights:
    """The fp32 copy of a 16-bit parameter that this rank's optimizer keeps: elements [start, start + numel) of it."""

    tensor: Tensor
    start: int


def fill_chunks(
    chunks: Sequence[Any],
    source: WeightSource[Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    find_master: Callable[[Tensor], MasterWeights | None] = lambda parameter: None,
    on_parameter: Callable[[int], None] = lambda num_elements: None,
) -> Tensor:
    """Fill every parameter of this rank's model chunks, and the fp32 copies that `find_master` knows.

    metadata: of sharded_state_dict. on_parameter: called with the elements of each parameter once it is filled. Padding
    rows of the vocabulary become 0. Returns how many elements of each tensor, in the order of `source.pairs`, this rank
    holds first (not as the copy of another rank's): int64.
    Raises ConversionError with a sentence for every parameter that has no source and every value that is not finite.
    """
    filler = _Filler(source, find_master, on_parameter)
    for chunk in chunks:
        filler.fill(chunk, dict(metadata or {}))
    if filler.problems:
        raise ConversionError(*filler.problems)
    return torch.tensor(list(filler.num_held.values()))


def require_every_element(source: WeightSource[Any], num_held: Sequence[int]) -> None:
    """Raise ConversionError unless all ranks together hold each element once. num_held: summed over all ranks."""
    problems = [
        f"{source.folder}: {', '.join(pair.hf_names)} must go into the model whole, got {held:,} of "
        f"{pair.num_elements:,} elements. This is a bug; please report the command."
        for pair, held in zip(source.pairs, num_held, strict=True)
        if held != pair.num_elements
    ]
    if problems:
        raise ConversionError(*problems)


class _Filler:
    def __init__(
        self,
        source: WeightSource[Any],
        find_master: Callable[[Tensor], MasterWeights | None],
        on_parameter: Callable[[int], None],
    ):
        self.source, self.find_master, self.on_parameter = source, find_master, on_parameter
        self.problems: list[str] = []
        self.pairs = {pair.megatron_name: pair for pair in source.pairs}
        self.num_held = dict.fromkeys(self.pairs, 0)

    @torch.no_grad()
    def fill(self, chunk: Any, metadata: dict[str, Any]) -> None:
        """Fill one model chunk; what does not fit is noted in `problems`, with every other problem."""
        # An entry has the name of the checkpoint, which can differ from the name in the model. Its data is the
        # parameter's own memory, so the address identifies it.
        entries = list(_list_entries(chunk.sharded_state_dict(metadata=metadata)))
        # After that call, which brings buffers in 16 bits back to fp32, in memory of their own.
        left = {tensor.data_ptr(): (name, tensor) for name, tensor in _list_tensors(chunk)}
        for entry in entries:
            _, parameter = left.pop(entry.data.data_ptr(), (None, None))
            if parameter is None:
                self._report(entry.key, "nothing of the folder belongs into it, got a tensor that is no parameter")
            else:
                self._fill_parameter(entry, parameter)
        for name, _ in left.values():
            self._report(name, "a checkpoint must have a name for it, got none")

    def _fill_parameter(self, entry: Any, parameter: Tensor) -> None:
        # A factory builds several shards, for example gate and up. All must be parts of one tensor.
        names = {_name_shard(shard) for shard in _build_shards(entry, parameter.detach())}
        name = names.pop()
        if name not in self.pairs or names:
            self._report(entry.key, "must be one tensor of the folder's architecture, got none")
            return
        whole = self.source.read_pair(self.pairs[name])
        staged = torch.empty(parameter.shape, dtype=whole.dtype)
        num_filled = sum(self._fill_shard(name, shard, whole) for shard in _build_shards(entry, staged))
        if num_filled != staged.numel():
            self._report(name, f"must be filled whole, got {num_filled:,} of {staged.numel():,} elements")
        elif not torch.isfinite(staged).all():
            self._report(name, "must have finite values, got NaN or infinity")
        else:
            self._copy(name, staged, parameter)

    def _fill_shard(self, name: str, shard: Any, whole: Tensor) -> int:
        """Fill one shard's data, a view of the staged parameter; returns its elements, 0 where the shapes disagree."""
        global_shape = shard.global_shape[shard.prepend_axis_num :]
        starts = shard.global_offset[shard.prepend_axis_num :]
        # Only the vocabulary is padded. Any other difference of shapes means another model.
        can_be_padded = name in VOCABULARY_TENSORS and global_shape[0] > whole.shape[0]
        if tuple(global_shape) != tuple(whole.shape) and not (can_be_padded and global_shape[1:] == whole.shape[1:]):
            return 0
        boxes = zip(starts, shard.data.shape, whole.shape, strict=True)
        # min: a rank whose rows are all padding begins after the last row of the source.
        part = whole[tuple(slice(min(start, end), min(start + size, end)) for start, size, end in boxes)]
        shard.data[: part.shape[0]].copy_(part)
        shard.data[part.shape[0] :].zero_()
        from megatron.core.dist_checkpointing.mapping import is_main_replica

        # Other ranks can hold the same elements. Only the first copy counts, so the sum over all ranks is exact.
        if is_main_replica(shard.replica_id):
            self.num_held[name] += part.numel()
        return int(shard.data.numel())

    def _copy(self, name: str, staged: Tensor, parameter: Tensor) -> None:
        parameter.copy_(staged)
        # The largest finite fp16 value is 65504: a finite bf16 or fp32 value can become infinity here.
        if parameter.dtype == torch.float16 and not torch.isfinite(parameter).all():
            self._report(name, f"must fit into fp16, got values up to {staged.abs().max():.4g}")
        # From the staged values, not from the parameter: fp32 copies keep what rounding to 16 bits would lose.
        master = self.find_master(parameter)
        if master is not None:
            flat = staged.view(-1)[master.start : master.start + master.tensor.numel()]
            master.tensor.view(-1).copy_(flat)
        self.on_parameter(staged.numel())

    def _report(self, name: str, fact: str) -> None:
        remedies = {"NaN": "Fetch the folder again, or save the model anew.", "fp16": "Pass --precision bf16."}
        remedy = next((remedy for word, remedy in remedies.items() if word in fact), "Check config.json.")
        self.problems.append(f"{self._describe(name)}: {fact}. {remedy}")

    def _describe(self, name: str) -> str:
        """The HF names of a Megatron tensor, in their folder, where it has any."""
        pair = self.pairs.get(name)
        return name if pair is None else f"{self.source.folder}: {', '.join(pair.hf_names)}"


def _list_entries(state: Mapping[str, Any]) -> Iterator[Any]:
    """Sharded tensors and factories of them; objects without weights (fp8 scales) are left out."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(dict(state)):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            yield entry


def _build_shards(entry: Any, data: Tensor) -> list[Any]:
    """The sharded tensors that `entry` would be with `data` in place of its own, which are views of `data`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values([entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)]))
    return [dataclasses.replace(entry, data=data, dtype=data.dtype)]


def _name_shard(shard: Any) -> str:
    """mcore's name of the tensor that a shard is part of: its key, with the numbers of stacked layers and experts."""
    return split_stack(shard.key)[0].format(*shard.global_offset[: shard.prepend_axis_num])


def _list_tensors(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters and the buffers of a model chunk that a checkpoint keeps."""
    for name, value in chunk.state_dict(keep_vars=True).items():
        # TransformerEngine's scales of fp8, which no folder has, are a tensor of this dictionary too.
        if isinstance(value, Tensor) and "_extra_state" not in name:
            yield name, value
