"""What stays allocated from step to step: weights, gradients, optimizer state, and buffers that are never freed.

Sizes come tensor by tensor from `parameters.py`; bytes per parameter from Rajbhandari et al. 2020 (arXiv 1910.02054,
section 3.1) and megatron.core's distributed optimizer, Megatron-FSDP and TransformerEngine.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.layout import ParallelLayout, count_shards
from megatron_hammer.model.memory.options import QUANTIZED_BYTES, MemoryOptions
from megatron_hammer.model.parameters import (
    TensorSize,
    embedding_tensors,
    head_tensors,
    layer_tensors,
    padded_vocab_size,
)
from megatron_hammer.model.shape import ModelShape

# Per offloaded parameter, in pinned memory: the 16-bit copy that it was made from, the fp32 weight, its gradient and
# Adam's two moments. Source: megatron.core.optimizer.cpu_offloading.hybrid_optimizer.HybridDeviceOptimizer.
HOST_OPTIMIZER_BYTES = 2 + 4 + 4 + 8


class StageState(NamedTuple):
    """Bytes of one rank of a stage."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0  # of the offloaded part of the optimizer, in the memory of the host


class _PartSizes(NamedTuple):
    """Elements on one rank of one part of the model (a layer, the embedding, the head)."""

    dense: int
    expert: int
    linear: int  # of both, in the matrices of the layers' linears: what 8-bit formats apply to
    matrices: int  # of one copy of every weight matrix: all experts of a layer have the same shapes


def estimate_state(
    model: ModelShape,
    layout: ParallelLayout,
    options: MemoryOptions,
    *,
    kinds: Sequence[tuple[ModelShape, int]],
    is_first_stage: bool,
    is_last_stage: bool,
) -> StageState:
    """Weights, gradients, optimizer and lasting buffers of a rank whose stage holds these layers.

    kinds: at least one, as ModelShape.split_kinds has them.

    16-bit: 2 bytes of weight, 4 of main_grad (Megatron reduces bf16 gradients in fp32) and 12 of the optimizer, the
    fp32 master and Adam's two moments; fp32 needs no master, and Muon keeps one moment of matrices. The distributed
    optimizer divides the 12, FSDP all 18.
    """
    _, embedding, head = select_part_sizes(model, layout, options.vocab_divisible_by)
    layer, layers = _sum_layers(layout, options, kinds)
    dense, expert = layers.dense, layers.expert
    if is_first_stage:
        dense += embedding.dense
    linear = layers.linear
    if is_last_stage:
        dense, linear = dense + head.dense, linear + head.linear
    total = dense + expert
    dense_ranks, expert_ranks = count_shard_ranks(layout, options)
    shard = -(-dense // dense_ranks) + -(-expert // expert_ranks)
    element = options.element_bytes
    is_fsdp = options.sharding == "fsdp"
    weight_bytes, weight_copies = _count_weight_bytes(options, total, linear)
    buffers = options.workspace_bytes + weight_copies
    if options.has_fused_weight_gradients:
        # A tied head on the only stage is the embedding's weight.
        ends = (head.matrices or embedding.matrices) if is_last_stage else 0
        # TransformerEngine's placeholders for weight gradients that were added to main_grad: one per shape, and they
        # are never freed. The matrices of a layer have different shapes, and layers of a kind have the same ones.
        # Source: transformer_engine.pytorch.module.base.get_dummy_wgrad; megatron.core.tensor_parallel.layers uses it
        # for the head too: 2.1 GB for a head of hidden size 8192 and 128,256 tokens.
        buffers += element * (layer.matrices + ends)
    if is_fsdp:
        largest_end = max(embedding.dense * is_first_stage, head.dense * is_last_stage)
        buffers += _count_gathered_bytes(layer, largest_end, options, layers._replace(dense=dense, linear=linear))
    held = shard if is_fsdp else total
    updated = shard if _is_sharded(layout, options) else total
    num_offloaded = round(updated * options.optimizer_offload_ratio)
    return StageState(
        weights=round(weight_bytes * held / total) if total else 0,
        gradients=options.gradient_bytes * held,
        optimizer=_count_optimizer_bytes(options, total, linear, updated - num_offloaded),
        buffers=buffers,
        host=HOST_OPTIMIZER_BYTES * num_offloaded,
    )


def _sum_layers(
    layout: ParallelLayout, options: MemoryOptions, kinds: Sequence[tuple[ModelShape, int]]
) -> tuple[_PartSizes, _PartSizes]:
    """(the largest of these layers, all of them); both have the matrices of every shape once."""
    sizes = [(select_part_sizes(kind, layout, options.vocab_divisible_by)[0], num) for kind, num in kinds]
    largest = max((layer for layer, _ in sizes), key=lambda layer: layer.dense + layer.expert)
    if len(kinds) > 1:  # attention is the same in both
        tensors = {tensor.name: tensor for kind, _ in kinds for tensor in layer_tensors(kind)}
        largest = largest._replace(matrices=_cut_tensors(kinds[-1][0], layout, list(tensors.values())).matrices)
    dense, expert, linear = (sum(num * layer[part] for layer, num in sizes) for part in range(3))
    return largest, _PartSizes(dense, expert, linear, largest.matrices)


def _count_optimizer_bytes(options: MemoryOptions, total: int, linear: int, held: int) -> int:
    """Master weights and moments of `held` of the stage's `total` elements, of which `linear` are in matrices.

    Megatron gives each rank whole matrices of Muon's; their sum is taken as evenly divided.
    """
    if not total:
        return 0
    master_bytes = options.master_bytes if options.element_bytes == 2 else 0
    moments_bytes = options.moments_bytes * (total - linear) + options.matrix_moments_bytes * linear
    return master_bytes * held + round(moments_bytes * held / total)


def count_shard_ranks(layout: ParallelLayout, options: MemoryOptions) -> tuple[int, int]:
    """Ranks over which dense and expert state is sharded: (1, 1) where it is not."""
    if not _is_sharded(layout, options):
        return 1, 1
    return count_shards(layout, options.shard_size)


@lru_cache(maxsize=4096)
def _select_part_sizes(
    model: ModelShape, layout: ParallelLayout, vocab_divisible_by: int
) -> tuple[_PartSizes, _PartSizes, _PartSizes]:
    tp = layout.tensor_model_parallel_size
    rows = padded_vocab_size(model.vocab_size, divisible_by=vocab_divisible_by, tensor_model_parallel_size=tp)
    is_apart = layout.pipeline_model_parallel_size > 1
    return (
        _cut_tensors(model, layout, layer_tensors(model)),
        _cut_tensors(model, layout, embedding_tensors(model, rows)),
        _cut_tensors(model, layout, head_tensors(model, rows, is_apart=is_apart)),
    )


def select_part_sizes(
    model: ModelShape, layout: ParallelLayout, vocab_divisible_by: int
) -> tuple[_PartSizes, _PartSizes, _PartSizes]:
    """One layer of a model whose layers are alike, the embedding and the head on one rank; kept, for they depend on few
    of a layout's fields.
    """
    cut = ParallelLayout(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=min(2, layout.pipeline_model_parallel_size),
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    return _select_part_sizes(model, cut, vocab_divisible_by)


def _cut_tensors(model: ModelShape, layout: ParallelLayout, tensors: list[TensorSize]) -> _PartSizes:
    num_local_experts = model.moe.num_experts // layout.expert_model_parallel_size if model.moe else 0
    dense = expert = linear = matrices = 0
    for tensor in tensors:
        if tensor.cut.startswith("expert"):
            numel = tensor.numel // (layout.expert_tp if tensor.cut == "expert_tensor" else 1)
            copies = num_local_experts
            expert += copies * numel
        else:
            numel = tensor.numel // (layout.tensor_model_parallel_size if tensor.cut == "tensor" else 1)
            copies = 1
            dense += numel
        if ("linear_" in tensor.name or "eh_proj" in tensor.name) and tensor.name.endswith(".weight"):
            linear += copies * numel
            matrices += numel
        elif tensor.name in ("output_layer.weight", "embedding.word_embeddings.weight"):
            matrices += numel
    return _PartSizes(dense, expert, linear, matrices)


def _is_sharded(layout: ParallelLayout, options: MemoryOptions) -> bool:
    if options.sharding is None:
        return layout.has_distributed_optimizer
    return options.sharding != "none"


def _count_weight_bytes(options: MemoryOptions, total: int, linear: int) -> tuple[int, int]:
    """(the weights themselves, what lasts beside them) of `total` elements, `linear` of them in the layers' linears.

    TransformerEngine makes the quantized copies of a weight once per step and keeps them, also under Megatron-FSDP.
    With quantized parameters these copies are the weights, and no 16-bit ones exist. FSDP makes the transposed copies
    of per-tensor fp8 only for the layer at work (fp8_discard_transpose_cache of Megatron-FSDP).
    """
    element = options.element_bytes
    quantized = QUANTIZED_BYTES.get(options.precision)
    if quantized is None:
        return element * total, 0
    if not options.has_quantized_parameters:
        return element * total, round(_count_copies(options) * quantized * linear)
    is_transposed_late = options.sharding == "fsdp" and options.precision == "fp8"
    copies = quantized * linear * (1 if is_transposed_late else _count_copies(options))
    # MXFP8 is gathered in 16 bits, into the buffer of the gradients (_ParamAndGradBuffer of megatron.core).
    return element * (total - linear) + round(copies), 0


def _count_copies(options: MemoryOptions) -> int:
    return 2 if options.has_transposed_weights else 1


def _count_gathered_bytes(layer: _PartSizes, largest_end: int, options: MemoryOptions, whole: _PartSizes) -> int:
    """FSDP's whole parts: the layer at work and the next one's weights, a part's gradient on its way, the ends.

    Units are a layer, the embedding and the head (Megatron-FSDP and FSDP2 alike); an end is whole while it works.
    Quantized parameters travel quantized. Without resharding, as FSDP2 under a pipeline, all of the rank's weights and
    gradients are whole. whole: all elements of the rank.
    """
    element, gradient = options.element_bytes, options.gradient_bytes
    if not options.reshards_after_forward:
        total = whole.dense + whole.expert
        return _count_unit_bytes(options, total, whole.linear) + gradient * total
    layer_size = layer.dense + layer.expert
    unit = _count_unit_bytes(options, layer_size, layer.linear)
    return 2 * unit + max(unit + gradient * layer_size, (element + gradient) * largest_end)


def _count_unit_bytes(options: MemoryOptions, total: int, linear: int) -> int:
    """The gathered weights of `total` elements, `linear` of them in the layers' linears."""
    quantized = QUANTIZED_BYTES.get(options.precision)
    if quantized is None or not options.has_quantized_parameters:
        return options.element_bytes * total
    return options.element_bytes * (total - linear) + round(_count_copies(options) * quantized * linear)
