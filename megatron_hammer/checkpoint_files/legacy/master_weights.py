"""Where the optimizer of a legacy checkpoint keeps the fp32 copy of each weight of a rank.

The distributed optimizer saves one flat array for each buffer of gradients, gathered from its data-parallel ranks, in
`distrib_optim.pt`, without names: the order is that of the parameters, backwards, and the gaps follow from Megatron's
rules for buckets. The plain one saves lists of tensors, one for each parameter group. Neither is trusted: the lengths
must come out exactly here, and reader.py holds every weight against the model's own.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hammer.checkpoint_files.legacy.names import TIED_HEAD, select_expert, translate_name
from megatron_hammer.checkpoint_files.legacy.rank_files import ParallelSizes, RankFile, load_state
from megatron_hammer.checkpoint_files.located_tensor import LocatedTensor, locate_in_storage
from megatron_hammer.checkpoint_files.saved_archive import open_archive
from megatron_hammer.errors import CheckpointError
from megatron_hammer.files.read import is_present

OPTIMIZER_FILE = "distrib_optim.pt"
_PLAIN_KEY = "fp32_from_fp16_params"
_PARAMETER_ALIGNMENT = 64  # megatron.core.optimizer.param_layout; none before megatron-core
_LEAST_BUCKET_SIZE = 40_000_000  # elements; megatron.core DistributedDataParallel.__init__


class Parameter(NamedTuple):
    """One weight of a rank: which model chunk has it, and the name that it has there."""

    vp_stage: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate_masters(file: RankFile, sizes: ParallelSizes, args: Any) -> dict[tuple[int, str], LocatedTensor]:
    """The fp32 copies in a rank's optimizer, by (vp_stage, name in the chunk).

    Weights that are fp32 themselves have none, nor have those whose data-parallel rank 0 wrote to another file.
    Raises CheckpointError where the state is missing or of a kind whose order is not known exactly.
    """
    parameters = list(_list_parameters(file))
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return {}
    experts = [
        p for p in parameters if sizes.has_expert_optimizer and select_expert(translate_name(p.name)) is not None
    ]
    dense = [parameter for parameter in parameters if parameter not in experts]
    groups = [group for group in (dense, experts) if group]
    path = file.path.with_name(OPTIMIZER_FILE)
    is_distributed = is_present(path)
    states = load_state(path, (dict, list)) if is_distributed else file.optimizer
    # ChainedOptimizer.save_parameter_state saves a list only for more than one optimizer, with None for one whose
    # data-parallel rank 0 is another rank.
    states = states if isinstance(states, list) else [states]
    if len(states) != len(groups) or not any(isinstance(state, Mapping) for state in states):
        raise _unknown(
            file, f"{len([state for state in states if state])} optimizers for {len(groups)} kinds of weights"
        )
    masters: dict[tuple[int, str], LocatedTensor] = {}
    for group, state in zip(groups, states, strict=True):
        if state is not None and is_distributed:
            masters |= _locate_in_buffers(file, group, state, args)
        elif state is not None:
            masters |= _locate_in_lists(file, group, state, args)
    return masters


def _list_parameters(file: RankFile) -> Iterator[Parameter]:
    """In the order of the model's modules, which is that of the state dict."""
    for vp_stage, chunk in enumerate(file.chunks):
        for name, value in chunk.items():
            if isinstance(value, Tensor) and not name.endswith("router.expert_bias"):  # a buffer
                yield Parameter(vp_stage, name, tuple(value.shape), value.dtype)


def _locate_in_buffers(
    file: RankFile, parameters: Sequence[Parameter], state: Mapping[Any, Any], args: Any
) -> dict[tuple[int, str], LocatedTensor]:
    """Source: megatron.core DistributedOptimizer.get_parameter_state_dp_zero."""
    if not state.get("buckets_coalesced"):
        raise _unknown(file, "a distributed optimizer of before its buckets were joined")
    # One buffer for each model chunk and dtype, in the order in which its first parameter comes.
    buffers: dict[tuple[int, torch.dtype], list[Parameter]] = {}
    for parameter in parameters:
        buffers.setdefault((parameter.vp_stage, parameter.dtype), []).append(parameter)
    # - 1: the keys are the numbers of the buffers, and buckets_coalesced.
    stored = [entry for index in range(len(state) - 1) for entry in state.get(index, {}).items()]
    if [dtype for _, dtype in buffers] != [key[0] for key, _ in stored]:
        raise _unknown(file, f"{len(stored)} buffers for {len(buffers)}")
    path = file.path.with_name(OPTIMIZER_FILE)
    located, archive = {}, open_archive(path)
    for own, (_, tensors) in zip(buffers.values(), stored, strict=True):
        flat = tensors["param"]
        starts = _place(own, flat.numel(), args)
        if starts is None or flat.dtype != torch.float32:
            raise _unknown(file, f"{flat.numel():,} elements of {flat.dtype}, which no order of the weights gives")
        whole = locate_in_storage(path, flat, archive)
        for parameter, start in zip(own, starts, strict=True):
            located[parameter.vp_stage, parameter.name] = _select_part(whole, start, parameter.shape)
    return located


def _place(parameters: Sequence[Parameter], num_elements: int, args: Any) -> list[int] | None:
    """Where each parameter starts in a flat array of that length; None if no rule of Megatron's gives the length."""
    dp = (getattr(args, "data_parallel_size", None) or 1) * (getattr(args, "context_parallel_size", None) or 1)
    # None: Megatron makes a single bucket without --overlap-grad-reduce, and on all pipeline stages but the first.
    # Source: megatron.core DistributedDataParallel.__init__, also of the formula.
    bucket_sizes = (
        None,
        getattr(args, "ddp_bucket_size", None) or max(_LEAST_BUCKET_SIZE, 1_000_000 * dp),
        _LEAST_BUCKET_SIZE,
    )
    is_tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    for alignment, bucket_size, has_own_bucket in itertools.product(
        (_PARAMETER_ALIGNMENT, 1), bucket_sizes, (is_tied, False)
    ):
        starts, length = place_parameters(
            [math.prod(parameter.shape) for parameter in parameters],
            [has_own_bucket and _is_shared(parameter.name) for parameter in parameters],
            alignment=alignment,
            bucket_size=bucket_size,
        )
        # A wrong rule may give the right length by chance. reader.py then finds weights that differ from the model's.
        if length == num_elements:
            return starts
    return None


def _is_shared(name: str) -> bool:
    """Whether first and last stage keep a copy of it, if the model is tied."""
    return translate_name(name) in ("embedding.word_embeddings.weight", TIED_HEAD)


def place_parameters(
    sizes: Sequence[int], is_shared: Sequence[bool], *, alignment: int, bucket_size: int | None
) -> tuple[list[int], int]:
    """Where parameters of `sizes` elements start in a gathered buffer, and how long it is.

    They lie backwards, each on a multiple of `alignment` in its bucket; a bucket ends once it has `bucket_size`
    elements, and a shared embedding has one of its own. The padding between buckets is left out.
    Source: megatron.core DistributedOptimizer._compute_per_buffer_param_layout.
    """
    starts, num_before, end, is_empty = [], 0, 0, True
    for size, has_own_bucket in zip(reversed(sizes), reversed(is_shared), strict=True):
        # Before the check for a new bucket, as in Megatron: the alignment counts as part of the bucket that ends here.
        start = -(-end // alignment) * alignment
        if has_own_bucket and not is_empty:
            num_before, start = num_before + start, 0
        starts.append(num_before + start)
        end, is_empty = start + size, False
        if has_own_bucket or (bucket_size is not None and end >= bucket_size):
            num_before, end, is_empty = num_before + end, 0, True
    return starts[::-1], num_before + end


def _select_part(whole: LocatedTensor, start: int, shape: tuple[int, ...]) -> LocatedTensor:
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if whole.in_memory is not None:
        part = whole.in_memory[start : start + math.prod(shape)].view(shape)
        return replace(whole, shape=shape, stride=stride, in_memory=part)
    return replace(whole, shape=shape, stride=stride, start=whole.start + start * whole.dtype.itemsize)


def _locate_in_lists(
    file: RankFile, parameters: Sequence[Parameter], state: Mapping[Any, Any], args: Any
) -> dict[tuple[int, str], LocatedTensor]:
    """Source: megatron.core Float16OptimizerWithFloat16Params: lists in the order of the parameter groups."""
    lists = state.get(_PLAIN_KEY)
    if lists is None:
        raise _unknown(file, f"an optimizer with {sorted(map(str, state))}")
    settings = state["optimizer"]["param_groups"]
    low_precision = [parameter for parameter in parameters if parameter.dtype != torch.float32]
    located = {}
    for tensors, setting in zip(lists, settings, strict=True):
        has_decay = setting.get("wd_mult", 1.0) != 0.0
        own = [p for p in low_precision if len(lists) == 1 or has_decay == _has_decay(p, args)]
        if [tuple(tensor.shape) for tensor in tensors] != [parameter.shape for parameter in own]:
            raise _unknown(file, f"{len(tensors)} tensors in a parameter group for {len(own)} weights")
        for tensor, parameter in zip(tensors, own, strict=True):
            located[parameter.vp_stage, parameter.name] = locate_in_storage(file.path, tensor, file.archive)
    if len(located) != len(low_precision):
        raise _unknown(file, f"{len(located)} tensors for {len(low_precision)} weights")
    return located


def _has_decay(parameter: Parameter, args: Any) -> bool:
    """Megatron exempts biases and vectors from weight decay, in a group of their own, on demand not those of q and k.

    Source: megatron.core.optimizer.get_standard_config_overrides.
    """
    is_qk_norm = "q_layernorm." in parameter.name or "k_layernorm." in parameter.name
    return len(parameter.shape) > 1 or (is_qk_norm and getattr(args, "apply_wd_to_qk_layernorm", False))


def _unknown(file: RankFile, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path.parent}: fp32 master weights must be in the optimizer's state in an order that is known exactly, "
        f"got {found}. Pass --weights model."
    )
