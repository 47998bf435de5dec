"""A dense model as a mixture of experts that computes the same function at step 0.

Every expert is a copy of the dense MLP. With granularity G, the MLP is cut along its width into G slices, expert e
holds slice e mod G, and G neighbouring experts (a virtual group) have the same router row, so that a token's top k
holds whole groups. Megatron normalises the chosen experts' weights to one: they sum to one over copies of the MLP, or
over its slices to 1/G, which a factor G on linear_fc2 undoes, exactly where G is a power of two.

megatron's own upcycling spreads that factor over both matrices as its cube root, which changes what the activation
sees; and with --moe-router-pre-softmax the chosen weights do not sum to one, so that no factor is exact: then the same
mean factor E*G/K is taken as there, and the function is near the dense one as long as the router is near uniform.
Source: arXiv:2410.07524; megatron.core.transformer.moe.upcycling_utils.
"""

import functools
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.checkpoint.surgery.chunk_layout import layout_of
from megatron_hammer.checkpoint.surgery.rewriting import (
    OnTensor,
    PlannedCheckpoint,
    PlannedTensor,
    copy_objects,
    plan_copy,
    write_planned_checkpoint,
)
from megatron_hammer.checkpoint.surgery.training_checkpoint import TrainingCheckpoint, open_training_checkpoint
from megatron_hammer.checkpoint.surgery.weights_only import build_release_state
from megatron_hammer.checkpoint_files.pickle_writer import dump_object
from megatron_hammer.errors import ConversionError

_LAYERS = "decoder.layers."
_FC1, _FC2 = _LAYERS + "mlp.linear_fc1.weight", _LAYERS + "mlp.linear_fc2.weight"
_EXPERTS = _LAYERS + "mlp.experts.experts."
_ROUTER = _LAYERS + "mlp.router.weight"
# TransformerEngine's dense layer has its norm inside linear_fc1; a router needs it before.
_RENAMED = {
    _LAYERS + "mlp.linear_fc1.layer_norm_weight": _LAYERS + "pre_mlp_layernorm.weight",
    _LAYERS + "mlp.linear_fc1.layer_norm_bias": _LAYERS + "pre_mlp_layernorm.bias",
}
_SEED_STRIDE = 1_000_003  # a prime, so that layers of neighbouring seeds do not share their random numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShape:
    """The mixture to build, in mcore's names. granularity: number of slices that the dense MLP is cut into.

    router_std: of the router's random rows; None for the checkpoint's init_method_std.
    """

    num_experts: int
    router_topk: int
    granularity: int = 1
    has_pre_softmax: bool = False
    router_std: float | None = None
    seed: int = 1234

    @property
    def output_scale(self) -> float:
        """What linear_fc2 is multiplied with."""
        if self.has_pre_softmax:
            return self.num_experts * self.granularity / self.router_topk
        return float(self.granularity)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcycleReport:
    """What was written. is_exact: whether the function at step 0 is the dense one up to rounding."""

    save_dir: Path
    iteration: int
    num_experts: int
    expert_ffn_hidden_size: int
    num_parameters_before: int
    num_parameters: int
    is_exact: bool
    elapsed_s: float


def upcycle(
    load_dir: Path,
    save_dir: Path,
    shape: ExpertShape,
    *,
    expert_ffn_hidden_size: int | None = None,
    iteration: int | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor = lambda stage, done, total: None,
) -> UpcycleReport:
    """Write `save_dir/release` with the experts, complete and recomputed, or nothing.

    expert_ffn_hidden_size: the width of an expert, given in place of the granularity.
    Raises ConversionError, all reasons at once, where the model or the numbers do not allow it.
    """
    started_at_s = time.monotonic()
    checkpoint = open_training_checkpoint(load_dir, iteration=iteration)
    if expert_ffn_hidden_size is not None:
        shape = replace(shape, granularity=_find_granularity(checkpoint, shape, expert_ffn_hidden_size))
    _validate(checkpoint, shape)
    state = build_release_state(checkpoint)
    args = state["args"]
    _change_arguments(args, shape)
    tensors = _plan_tensors(checkpoint, shape, args)
    planned = PlannedCheckpoint(
        tensors=tensors,
        objects=_plan_objects(checkpoint, shape),
        common_state=state,
        iteration=None,
    )
    write_planned_checkpoint(save_dir, planned, on_tensor, sources=[checkpoint], overwrite=overwrite)
    return UpcycleReport(
        save_dir=save_dir,
        iteration=state["iteration"],
        num_experts=shape.num_experts,
        expert_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_parameters_before=sum(math.prod(stored.shape) for stored in checkpoint.model.values()),
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        is_exact=not shape.has_pre_softmax,
        elapsed_s=time.monotonic() - started_at_s,
    )


def slice_gate_up(rows: Tensor, *, granularity: int, part: int, is_gated: bool) -> Tensor:
    """One expert's linear_fc1 out of the dense one: the same rows of gate and of up where there are both.

    rows: [2f, h] or [f, h]. Returns [2f / granularity, h] or [f / granularity, h].
    """
    # linear_fc1 has all rows of gate above all rows of up, so a slice of its rows would hold gate only.
    halves = rows.chunk(2) if is_gated else (rows,)
    return torch.cat([half.chunk(granularity)[part] for half in halves])


def _plan_tensors(checkpoint: TrainingCheckpoint, shape: ExpertShape, args: Namespace) -> list[PlannedTensor]:
    tensors = []
    for key in checkpoint.model:
        if key == _FC1:
            tensors += [_plan_router(checkpoint, shape, args), _plan_fc1(checkpoint, shape, args)]
        elif key == _FC2:
            tensors.append(_plan_fc2(checkpoint, shape, args))
        else:
            tensors.append(plan_copy(checkpoint, key, written_as=_RENAMED.get(key)))
    return tensors


def _plan_fc1(checkpoint: TrainingCheckpoint, shape: ExpertShape, args: Namespace) -> PlannedTensor:
    stored = checkpoint.model[_FC1]
    layers, rows, hidden_size = stored.shape
    full = (layers, shape.num_experts, rows // shape.granularity, hidden_size)

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        layer, expert = offsets[:2]
        # The whole matrix: an expert's rows of gate and of up are far apart in it.
        dense = checkpoint.store.read(_FC1, (layer, 0, 0), (1, rows, hidden_size))[0]
        whole = slice_gate_up(
            dense, granularity=shape.granularity, part=expert % shape.granularity, is_gated=bool(args.swiglu)
        )
        return _box_of(whole, offsets, sizes)

    return _plan_expert_tensor(_EXPERTS + "linear_fc1.weight", full, stored.dtype, args, read)


def _plan_fc2(checkpoint: TrainingCheckpoint, shape: ExpertShape, args: Namespace) -> PlannedTensor:
    stored = checkpoint.model[_FC2]
    layers, hidden_size, columns = stored.shape
    width = columns // shape.granularity
    full = (layers, shape.num_experts, hidden_size, width)

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        layer, expert = offsets[:2]
        # Column i of linear_fc2 belongs to row i of gate and of up, so slices of equal number fit together.
        first = expert % shape.granularity * width
        dense = checkpoint.store.read(_FC2, (layer, 0, first), (1, hidden_size, width))[0]
        # Multiplied in fp32 and rounded once.
        whole = dense if shape.output_scale == 1 else (dense.float() * shape.output_scale).to(dense.dtype)
        return _box_of(whole, offsets, sizes)

    return _plan_expert_tensor(_EXPERTS + "linear_fc2.weight", full, stored.dtype, args, read)


def _plan_router(checkpoint: TrainingCheckpoint, shape: ExpertShape, args: Namespace) -> PlannedTensor:
    layers, _, hidden_size = checkpoint.model[_FC1].shape
    std = args.init_method_std if shape.router_std is None else shape.router_std
    full = (layers, shape.num_experts, hidden_size)
    dtype = checkpoint.model[_FC1].dtype

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        return _box_of(build_router(offsets[0], shape, hidden_size=hidden_size, std=std).to(dtype), offsets, sizes)

    return _plan_expert_tensor(_ROUTER, full, dtype, args, read)


def build_router(layer: int, shape: ExpertShape, *, hidden_size: int, std: float) -> Tensor:
    """Random rows of one layer [num_experts, h] in fp32: one for each virtual group, repeated for its experts."""
    # A generator for each layer: a box is computed twice, to write and to verify it, and in any order.
    generator = torch.Generator().manual_seed((shape.seed * _SEED_STRIDE + layer) % (1 << 63))
    groups = torch.randn(shape.num_experts // shape.granularity, hidden_size, generator=generator) * std
    # Equal rows give equal logits, so that the top k holds whole groups.
    return groups.repeat_interleave(shape.granularity, dim=0)


def _plan_expert_tensor(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, args: Namespace, read: Any
) -> PlannedTensor:
    return PlannedTensor(key=key, shape=shape, dtype=dtype, boxes=layout_of(args).cut(key, shape), read=read)


def _box_of(matrix: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """The part of a layer's (or an expert's) matrix that a box is, with the box's leading axes of one."""
    inner = [slice(first, first + size) for first, size in zip(offsets[-2:], sizes[-2:], strict=True)]
    return matrix[tuple(inner)].reshape(sizes)


def _plan_objects(checkpoint: TrainingCheckpoint, shape: ExpertShape) -> dict[str, Any]:
    """megatron's extra states: those of the dense matrices become those of every expert."""
    objects: dict[str, Any] = {}
    layers = checkpoint.model[_FC1].shape[0]
    for key, read_bytes in copy_objects(checkpoint, checkpoint.list_model_objects()).items():
        if not key.startswith(_LAYERS + "mlp."):
            objects[key] = read_bytes
            continue
        # Keys are <module>._extra_state/shard_<index>_<number of layers>; experts have a second index and number.
        name, _, place = key.removeprefix(_LAYERS + "mlp.").partition("/shard_")
        layer = place.split("_")[0]
        for expert in range(shape.num_experts):
            objects[f"{_EXPERTS}{name}/shard_{layer}.{expert}_{layers}.{shape.num_experts}"] = read_bytes
        if name.startswith("linear_fc1."):  # of TransformerEngine's norm, which has left it
            norm = f"{_LAYERS}pre_mlp_layernorm._extra_state/shard_{layer}_{layers}"
            objects[norm] = functools.partial(dump_object, [None])
    return objects


def _change_arguments(args: Namespace, shape: ExpertShape) -> None:
    args.num_experts = shape.num_experts
    args.moe_router_topk = shape.router_topk
    args.moe_ffn_hidden_size = args.ffn_hidden_size // shape.granularity
    args.moe_layer_freq = 1  # every layer is a mixture, as the weights are
    args.moe_router_pre_softmax = shape.has_pre_softmax
    args.moe_router_score_function = "softmax"
    args.moe_shared_expert_intermediate_size = None
    args.moe_shared_expert_gate = False


def _find_granularity(checkpoint: TrainingCheckpoint, shape: ExpertShape, width: int) -> int:
    ffn = checkpoint.args.ffn_hidden_size
    if width < 1 or ffn % width or shape.granularity not in (1, ffn // width):
        raise ConversionError(
            "moe-ffn-hidden-size: must be ffn_hidden_size over the granularity, got "
            f"moe_ffn_hidden_size={width}, ffn_hidden_size={ffn}, moe_upcycling_granularity={shape.granularity}. "
            "Pass one of the two."
        )
    return int(ffn // width)


def _validate(checkpoint: TrainingCheckpoint, shape: ExpertShape) -> None:
    problems = [*_find_model_problems(checkpoint), *_find_width_problems(checkpoint.args, shape)]
    # A granularity below 1 is a problem already (widths), and nothing can be divided by 0.
    problems += _find_grouping_problems(shape) if shape.granularity >= 1 else []
    if problems:
        raise ConversionError(*problems)


def _find_model_problems(checkpoint: TrainingCheckpoint) -> Iterator[str]:
    args = checkpoint.args
    num_experts = getattr(args, "num_experts", None)
    if num_experts:
        yield f"{checkpoint.directory}: model must be dense, got num_experts={num_experts}. Pass a dense checkpoint."
    elif not {_FC1, _FC2} <= checkpoint.model.keys():
        yield (
            f"{checkpoint.directory}: must hold {_FC1} and {_FC2}, got {len(checkpoint.model)} other tensors. "
            "Only GPT and Llama models with equal layers can be upcycled."
        )
    if args.add_bias_linear:
        yield (
            f"{checkpoint.directory}: MLP must have no biases, as experts have none, got add_bias_linear=True. "
            "Only models without them can be upcycled."
        )


def _find_width_problems(args: Any, shape: ExpertShape) -> Iterator[str]:
    if shape.num_experts < 2:
        yield f"num-experts: must be at least 2, got num_experts={shape.num_experts}. Pass more."
    if shape.router_std is not None and not 0 < shape.router_std < math.inf:
        yield f"router-init-std: must be positive and finite, got router_std={shape.router_std}. Pass 0.02, or drop it."
    if shape.granularity < 1 or args.ffn_hidden_size % shape.granularity:
        yield (
            "moe-upcycling-granularity: must divide ffn_hidden_size, got "
            f"moe_upcycling_granularity={shape.granularity}, ffn_hidden_size={args.ffn_hidden_size}. Pass a divisor."
        )


def _find_grouping_problems(shape: ExpertShape) -> list[str]:
    experts, topk, granularity = shape.num_experts, shape.router_topk, shape.granularity
    problems = []
    if not 1 <= topk <= experts:
        problems.append(
            f"moe-router-topk: must be between 1 and num_experts, got moe_router_topk={topk}, num_experts={experts}. "
            "Change one of the two."
        )
    for flag, name, number in (("num-experts", "num_experts", experts), ("moe-router-topk", "moe_router_topk", topk)):
        if number % granularity:
            problems.append(
                f"{flag}: must be a multiple of the granularity, so that a token's experts make up whole MLPs, got "
                f"{name}={number}, moe_upcycling_granularity={granularity}. Pass a multiple of {granularity}."
            )
    if topk == 1 and not shape.has_pre_softmax:
        problems.append(
            "moe-router-pre-softmax: must be on where one expert is chosen, got moe_router_topk=1: normalised over one "
            "expert the router's weight is always 1 and it learns nothing. Pass --moe-router-pre-softmax, or a larger "
            "--moe-router-topk."
        )
    return problems
