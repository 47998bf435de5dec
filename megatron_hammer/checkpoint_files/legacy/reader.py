"""Reads a legacy checkpoint (`--ckpt-format torch`, folders mp_rank_*) of any layout, one tensor at a time.

Every rank's state dict is located, its names become mcore's, layers and experts get their place in the whole model, and
a read merges the parts of a tensor by the table of tensor_parallel.py. Copies of one part (embeddings of a tied model,
norms on every tensor-parallel rank, dense layers on every expert-parallel rank) must have the same bits.
No process group, GPU or megatron. It implements CheckpointReader; `open_checkpoint` chooses the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal
from megatron_hammer.checkpoint_files.checkpoint_reader import (
    VOCABULARY_TENSORS,
    name_dtype,
    remove_padding_rows,
    use_fused_norm_names,
    validate_iteration,
)
from megatron_hammer.checkpoint_files.legacy.master_weights import locate_masters
from megatron_hammer.checkpoint_files.legacy.names import (
    TIED_HEAD,
    select_expert,
    shift_name,
    translate_name,
)
from megatron_hammer.checkpoint_files.legacy.pipeline_stages import count_layers_before
from megatron_hammer.checkpoint_files.legacy.rank_files import ParallelSizes, RankFile, load_rank_files
from megatron_hammer.checkpoint_files.legacy.tensor_parallel import (
    RankLayout,
    order_qkv_by_heads,
    select_rank_layout,
)
from megatron_hammer.checkpoint_files.located_tensor import LocatedTensor, locate_in_storage, read_located
from megatron_hammer.checkpoint_files.saved_arguments import complete_arguments, list_missing
from megatron_hammer.errors import CheckpointError, ConversionError

EMBEDDING = VOCABULARY_TENSORS[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPart:
    """What one rank holds of a tensor.

    own_name: in the rank's file. model: the weight that a master weight must round to. old_qkv_version: where the rows
    are in the order of that version.
    """

    own_name: str
    located: LocatedTensor
    model: LocatedTensor | None = None
    old_qkv_version: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LegacyTensor:
    """A whole tensor: `parts` by tensor-parallel rank, each with all the copies of it that are stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: RankLayout
    parts: tuple[tuple[RankPart, ...], ...]


class LegacyReader:
    """One iteration of a legacy checkpoint, opened; obtain it with `open_legacy_checkpoint`.

    tensors: the model's, by mcore name. saved_args: the arguments that Megatron saved; args: the same under today's
    names, and complete (saved_arguments.py). iteration: of the saved state.
    """

    def __init__(self, directory: Path, *, weights: str = "model"):
        self.directory = directory
        sizes, files = load_rank_files(directory)
        self.saved_args: Any = files[0].args
        self.args: Any = complete_arguments(self.saved_args)
        if missing := list_missing(self.args, ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")):
            raise CheckpointError(
                f"{files[0].path}: arguments must hold the sizes of the model as positive whole numbers, got "
                f"{', '.join(missing)}. Load the checkpoint with the Megatron that wrote it and save it again."
            )
        self.iteration: int = files[0].iteration or 0
        self._head_dim: int = self.args.kv_channels
        self._agreed: set[str] = set()  # names whose copies were compared; a second read trusts them
        self.tensors = _assemble(directory, sizes, files, self.args, weights)

    def remove_vocab_padding(self, vocab_size: int) -> None:
        """Let the embedding and the head have `vocab_size` rows from now on; the padding is left out."""
        remove_padding_rows(self.tensors, vocab_size)

    def read(self, name: str) -> Tensor:
        """The tensor of that mcore name in its stored dtype; a view of the file where one rank holds it all.

        Raises ConversionError, naming the tensor and the file, if a copy of a part differs from another.
        """
        stored = self.tensors[name]
        parts = [self._read_part(name, copies) for copies in stored.parts]
        self._agreed.add(name)
        # Parts first, padding afterwards: the padding of the vocabulary lies in the last parts only.
        merged = stored.layout.merge(parts)
        return merged if tuple(merged.shape) == stored.shape else merged[: stored.shape[0]].contiguous()

    def _read_part(self, name: str, copies: tuple[RankPart, ...]) -> Tensor:
        first = read_located(copies[0].located, name)
        if name not in self._agreed:
            for number, copy in enumerate(copies):
                _validate_copy(name, copies[0], copy, first, read_located(copy.located, name) if number else first)
        if copies[0].old_qkv_version is None:
            return first
        return order_qkv_by_heads(first, checkpoint_version=copies[0].old_qkv_version, head_dim=self._head_dim)


def _validate_copy(name: str, original: RankPart, copy: RankPart, expected: Tensor, found: Tensor) -> None:
    """A copy has the bits of the original; a master weight rounds to the model's own."""
    if not is_bitwise_equal(expected, found):
        raise ConversionError(
            f"{copy.located.path}: {name} must equal its copy in {original.located.path}, got a difference. "
            "The ranks are of different runs or did not stay in step; use another iteration."
        )
    if copy.model is not None and not is_bitwise_equal(found.to(copy.model.dtype), read_located(copy.model, name)):
        raise ConversionError(
            f"{copy.located.path}: the fp32 master weight of {name} must round to the model's, got a difference. "
            "The optimizer's order is another, or it is of another step. Pass --weights model."
        )


def open_legacy_checkpoint(directory: Path, weights: str = "model") -> LegacyReader:
    """Open the directory of one iteration that holds mp_rank_* folders.

    weights: "master" for the optimizer's fp32 copy. Raises CheckpointError with a sentence for every rank that is
    missing, damaged or of another iteration, every name that no rule knows, and every tensor whose parts do not fit.
    """
    reader = LegacyReader(directory, weights=weights)
    validate_iteration(directory, reader.iteration)
    return reader


def _assemble(
    directory: Path, sizes: ParallelSizes, files: list[RankFile], args: Any, weights: str
) -> dict[str, LegacyTensor]:
    """Every tensor of the whole model, its parts put in their places by name."""
    before = count_layers_before(directory, files, args)
    problems: list[str] = []
    parts: dict[str, dict[int, list[RankPart]]] = {}
    for file in files:
        masters = locate_masters(file, sizes, args) if weights == "master" else None
        for vp_stage, num_layers_before in enumerate(before[file.rank.pp]):
            named = _locate_chunk(file, vp_stage, num_layers_before, args, problems)
            if masters is not None:
                named = _select_masters(named, vp_stage, masters)
            for name, part in named.items():
                # In an expert, the rank of the expert's own tensor parallelism.
                position = file.rank.tp if select_expert(name) is None else file.rank.tp % sizes.expert_tp
                parts.setdefault(name, {}).setdefault(position, []).append(part)
    if not getattr(args, "untie_embeddings_and_output_weights", False):
        # The last stage's copy of a tied embedding counts as a copy of it, and is no tensor of its own.
        for position, copies in parts.pop(TIED_HEAD, {}).items():
            parts.setdefault(EMBEDDING, {}).setdefault(position, []).extend(copies)
    tensors = {}
    for name, by_position in parts.items():
        # Experts have a tensor parallelism of their own.
        num_parts = sizes.tp if select_expert(name) is None else sizes.expert_tp
        tensor = _describe(name, by_position, num_parts, args, problems)
        if tensor is not None:
            tensors[name] = tensor
    if problems:
        # Every rank may have the same problem; it is said once.
        raise CheckpointError(*dict.fromkeys(f"{directory}: {problem}" for problem in problems))
    return tensors


def _locate_chunk(
    file: RankFile, vp_stage: int, num_layers_before: int, args: Any, problems: list[str]
) -> dict[str, RankPart]:
    """The tensors of one model chunk under the names that they have in the whole model."""
    num_ep_ranks = getattr(args, "expert_model_parallel_size", None) or 1
    num_local_experts = (getattr(args, "num_experts", None) or 0) // num_ep_ranks
    located = {}
    for own_name, value in file.chunks[vp_stage].items():
        if not isinstance(value, Tensor):
            problems.append(
                f"{own_name} must be a tensor, got {type(value).__name__} in {file.path.parent.name}. "
                "Load the checkpoint with the Megatron that wrote it and save it again."
            )
            continue
        is_old_qkv = ".query_key_value." in own_name and file.checkpoint_version not in (2, 3)
        if is_old_qkv and file.checkpoint_version not in (0, 1):
            problems.append(
                "checkpoint_version: the order of query_key_value is defined for 0, 1, 2 and 3, got "
                f"{file.checkpoint_version}. Load the checkpoint with the Megatron that wrote it and save it again."
            )
        name = shift_name(
            translate_name(own_name), num_layers=num_layers_before, num_experts=num_local_experts * file.rank.ep
        )
        located[name] = RankPart(
            own_name=own_name,
            located=locate_in_storage(file.path, value, file.archive),
            old_qkv_version=file.checkpoint_version if is_old_qkv else None,
        )
    return use_fused_norm_names(located)


def _select_masters(
    named: Mapping[str, RankPart], vp_stage: int, masters: Mapping[tuple[int, str], LocatedTensor]
) -> dict[str, RankPart]:
    """The fp32 copy in place of each weight that has one in this file; fp32 weights are their own."""
    selected = {}
    for name, part in named.items():
        if part.located.dtype == torch.float32:
            selected[name] = part
        elif (master := masters.get((vp_stage, part.own_name))) is not None:
            selected[name] = replace(part, located=master, model=part.located)
    return selected


def _describe(
    name: str, by_position: Mapping[int, list[RankPart]], num_parts: int, args: Any, problems: list[str]
) -> LegacyTensor | None:
    """The whole tensor; None, with a sentence in `problems`, where its parts do not make one."""
    is_gated = bool(getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False))
    layout = select_rank_layout(name, is_gated=is_gated)
    if layout is None:
        problems.append(
            f"{name}: no rule says how it lies on the ranks, got a tensor of that name. "
            "Load the checkpoint in training and save it with --ckpt-format torch_dist."
        )
        return None
    if missing := sorted(set(range(num_parts)) - set(by_position)):
        problems.append(
            f"{name}: every one of {num_parts} ranks must hold a part, got none on {missing}. "
            "The ranks are of different runs; use another iteration."
        )
        return None
    found = {(copy.located.shape, copy.located.dtype) for copies in by_position.values() for copy in copies}
    if len(found) > 1:
        kinds = ", ".join(sorted(f"{shape} {name_dtype(dtype)}" for shape, dtype in found))
        problems.append(
            f"{name}: must have one shape and dtype on all ranks, got {kinds}. "
            "The ranks are of different runs; use another iteration."
        )
        return None
    ((shape, dtype),) = found
    # A replicated tensor is one part, and what all the ranks hold are copies of it.
    if layout.axis is None:
        parts: tuple[tuple[RankPart, ...], ...] = (
            tuple(part for rank in sorted(by_position) for part in by_position[rank]),
        )
    else:
        parts = tuple(tuple(by_position[rank]) for rank in sorted(by_position))
        shape = tuple(size * (num_parts if axis == layout.axis else 1) for axis, size in enumerate(shape))
    return LegacyTensor(shape=shape, dtype=dtype, layout=layout, parts=parts)
