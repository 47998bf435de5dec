"""Estimated bytes of one GPU of every pipeline stage: what is exact is counted, what is not is a named allowance.

What stays (`state.py`) and the worst of three moments of a step: the loss, with every copy of the logits; the head's
backward pass (`loss.py`); a layer's backward pass (`activations.py`). `allocated_bytes` is what torch's allocator calls
max allocated; `total_bytes` adds what a device shows beyond it. tests/unit/model/memory/test_estimate.py holds it
against Korthikanti et al. 2022, and peaks that Megatron-LM's own tests and SimuMax recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.layout import ParallelLayout, find_grid_problems, raise_problems
from megatron_hammer.model.memory.activations import LayerActivations, estimate_layer_activations
from megatron_hammer.model.memory.loss import HeadMemory, count_embedding_bytes, estimate_head
from megatron_hammer.model.memory.offload import count_offloaded
from megatron_hammer.model.memory.options import Batch, MemoryOptions
from megatron_hammer.model.memory.state import StageState, estimate_state
from megatron_hammer.model.parameters import find_shard_problems, list_mtp_kinds
from megatron_hammer.model.pipeline_split import LayerRange, split_layers
from megatron_hammer.model.shape import ModelShape

# Allowances, not measurements of this machine: CUDA context and kernels (about 0.5 GiB on A100 and H100), NCCL
# communicators and TransformerEngine workspaces (about 1 GiB with three or four groups).
CUDA_CONTEXT_BYTES = 3 * 2**29
# Share of the tensors that come and go which the caching allocator holds on top of them. Without expandable segments a
# freed block serves only requests that fit into it: SimuMax's published B200 runs held 10 to 30%; a lower share here,
# because a refusal must be right. Expandable segments map freed pages of 2 MiB to any request: what torchtitan's runs
# with them reserved is within 4% of the tensors alone, on either side.
FRAGMENTATION_RATIO = 0.1
EXPANDABLE_FRAGMENTATION_RATIO = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Estimated peak of one rank of a pipeline stage. `total_bytes` is the sum of all bytes except the host's."""

    pp_rank: int
    num_layers: int
    num_in_flight: int  # forward passes of a model chunk that wait for their backward pass at the peak
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffers_bytes: int  # workspaces, placeholders, quantized copies, gathered layers: never freed
    activations_bytes: int  # kept between forward and backward pass
    logits_bytes: int  # at the peak: 0 where that is not at the loss
    transient_bytes: int  # gradients and gathered tensors at the peak
    context_bytes: int  # allowance
    fragmentation_bytes: int  # allowance
    host_bytes: int = 0  # offloaded to the memory of the host

    def list_parts(self) -> dict[str, int]:
        """Every field of bytes on the GPU by its name without `_bytes`; their sum is `total_bytes`."""
        return {
            field.name.removesuffix("_bytes"): getattr(self, field.name)
            for field in fields(self)
            if field.name.endswith("_bytes") and field.name != "host_bytes"
        }

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated reports."""
        return self.state_bytes + self.buffers_bytes + self.activations_bytes + self.logits_bytes + self.transient_bytes

    @property
    def total_bytes(self) -> int:
        return self.allocated_bytes + self.context_bytes + self.fragmentation_bytes


class _Moment(NamedTuple):
    """Bytes beside the state at one moment of a step."""

    activations: int
    logits: int
    transient: int


class _StageKind(NamedTuple):
    """What the state of a stage depends on."""

    counts: tuple[int, ...]  # of its layers, by their kinds, in the order of ModelShape.split_kinds
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        return sum(self.counts)


class _StagePeak(NamedTuple):
    pp_rank: int
    kind: _StageKind
    num_in_flight: int
    moment: _Moment
    host: int  # bytes of activations


def estimate_memory(
    model: ModelShape,
    layout: ParallelLayout,
    *,
    micro_batch_size: int,
    seq_length: int,
    num_microbatches: int,
    options: MemoryOptions | None = None,
    context_bytes: int = CUDA_CONTEXT_BYTES,
    fragmentation_ratio: float = FRAGMENTATION_RATIO,
    only_heaviest: bool = False,
) -> tuple[StageMemory, ...]:
    """The peak of each pipeline stage in one training step. On CPU pass context_bytes=0, fragmentation_ratio=0.

    num_microbatches: a step's, on one data-parallel rank. only_heaviest: of the stages that hold the same state, build
    only the one that holds most beside it; one of them has the largest total, and a search asks for no other.
    Raises ConfigError for a layout that cannot hold the model.
    """
    options = options or MemoryOptions()
    raise_problems(find_grid_problems(layout))
    batch = Batch(micro_batch_size=micro_batch_size, seq_length=seq_length)
    list_peaks = _list_heaviest_peaks if only_heaviest else _list_peaks
    peaks = list_peaks(model, _drop_data_parallelism(layout), batch, options, num_microbatches)
    return _build_stages(model, layout, options, peaks, context_bytes, fragmentation_ratio)


def count_in_flight(layout: ParallelLayout, pp_rank: int, num_microbatches: int) -> int:
    """Forward passes of a model chunk whose activations are alive at once on this stage: warm-up plus the current one.

    Source: megatron.core.pipeline_parallel.schedules (get_pp_rank_microbatches; microbatch_group_size_per_vp_stage is
    pp by default); Narayanan et al. 2021, arXiv 2104.04473, section 2.2. A chunk is a stage unless interleaved.
    """
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if pp == 1:
        return 1
    stages_behind = pp - pp_rank - 1
    num_warmup = stages_behind if vp == 1 else 2 * stages_behind + (vp - 1) * pp
    return min(num_warmup + 1, num_microbatches * vp)


def count_alive(layout: ParallelLayout, chunk_sizes: tuple[int, ...], num_in_flight: int, num_microbatches: int) -> int:
    """What of a stage's chunks is alive at the peak: layers or bytes of activations, as chunk_sizes has them per chunk.

    Chunks of equal size, or one: size x passes. Else (the embedding or the loss takes a layer's place in one chunk)
    the passes are counted in Megatron's order: pp micro-batches through a chunk, then through the next one; backward
    from the last chunk on, one pass behind `num_in_flight` forward ones.
    """
    if len(set(chunk_sizes)) == 1:
        return num_in_flight * chunk_sizes[0]
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    num_passes = num_microbatches * vp
    alive = most = 0
    for forward in range(min(num_passes, num_in_flight + 2 * pp * vp)):
        backward = forward - num_in_flight
        if backward >= 0:
            alive -= chunk_sizes[vp - 1 - backward // pp % vp]
        alive += chunk_sizes[forward // pp % vp]
        most = max(most, alive)
    return most


def _drop_data_parallelism(layout: ParallelLayout) -> ParallelLayout:
    """The layout with as few model copies as its experts allow: their number changes no activation."""
    expert_ranks = layout.expert_model_parallel_size * layout.expert_tp
    has_experts = expert_ranks != layout.tensor_model_parallel_size
    return replace(layout, data_parallel_size=expert_ranks if has_experts else 1)


@lru_cache(maxsize=1 << 14)
def _list_peaks(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions, num_microbatches: int
) -> tuple[_StagePeak, ...]:
    """What every stage holds beside its state at its worst moment; a search asks for the same ones again and again."""
    split = split_layers(model.num_layers, layout)
    raise_problems(find_shard_problems(model, layout))
    kinds = [kind for kind, _ in model.split_kinds()]
    layers = [_estimate_layer(kind, layout, batch, options) for kind in kinds]
    embedding = count_embedding_bytes(model, layout, batch, options)
    head = estimate_head(model, layout, batch, options)
    peaks = []
    last_pp_rank = len(split) - 1
    for pp_rank, chunks in enumerate(split):
        num_in_flight = count_in_flight(layout, pp_rank, num_microbatches)
        longest = max(chunk.num_layers for chunk in chunks)
        shared = [_share_units(layer, options, longest) for layer in layers]
        counts = [_count_kinds(model, kinds, chunk) for chunk in chunks]
        if pp_rank == last_pp_rank:
            counts[-1] = _add_mtp_layers(model, kinds, counts[-1])
        kept, on_host = zip(
            *(_sum_layers(count, shared, options.num_offloaded_layers) for count in counts), strict=True
        )
        first_chunks = -(-num_in_flight // layout.virtual_pipeline_model_parallel_size) if pp_rank == 0 else 0
        moment = _select_worst_moment(
            [layer for i, layer in enumerate(shared) if any(count[i] for count in counts)],
            count_alive(layout, kept, num_in_flight, num_microbatches) + first_chunks * embedding,
            head if pp_rank == last_pp_rank else None,
        )
        kind = _StageKind(tuple(map(sum, zip(*counts, strict=True))), pp_rank == 0, pp_rank == last_pp_rank)
        most_on_host = count_alive(layout, on_host, num_in_flight, num_microbatches)
        peaks.append(_StagePeak(pp_rank, kind, num_in_flight, moment, most_on_host))
    return tuple(peaks)


@lru_cache(maxsize=1 << 14)
def _list_heaviest_peaks(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions, num_microbatches: int
) -> tuple[_StagePeak, ...]:
    """Of the stages that hold the same state, the one that holds most beside it."""
    heaviest: dict[_StageKind, _StagePeak] = {}
    for peak in _list_peaks(model, layout, batch, options, num_microbatches):
        best = heaviest.get(peak.kind)
        if best is None or sum(peak.moment) > sum(best.moment):
            heaviest[peak.kind] = peak
    return tuple(heaviest.values())


def _estimate_layer(
    model: ModelShape, layout: ParallelLayout, batch: Batch, options: MemoryOptions
) -> LayerActivations:
    """A layer with what it offloads on the host, from where it comes back for the layer's own backward pass."""
    layer = estimate_layer_activations(model, layout, batch, options)
    offloaded = min(count_offloaded(model, layout, batch, options), layer.kept)
    return layer._replace(kept=layer.kept - offloaded, remade=layer.remade + offloaded, offloaded=offloaded)


def _sum_layers(counts: Sequence[int], layers: Sequence[LayerActivations], num_offloaded: int) -> tuple[int, int]:
    """(on the GPU, on the host) of a chunk, of whose layers the first `num_offloaded` move as a whole.

    They are gone at the end of the forward pass, where the others are complete, and come back as those are freed.
    """
    kept = sum(num * layer.kept for num, layer in zip(counts, layers, strict=True))
    on_host = sum(num * layer.offloaded for num, layer in zip(counts, layers, strict=True))
    moved = kept * min(num_offloaded, sum(counts)) // max(1, sum(counts))
    return kept - moved, on_host + moved


def _share_units(layer: LayerActivations, options: MemoryOptions, num_layers: int) -> LayerActivations:
    """A layer of a chunk of `num_layers` when units of several are recomputed, or only some of them.

    uniform: one input is kept for a unit, and a whole unit is made again at once. block: the first layers of a chunk
    are recomputed one by one, the others keep everything; here every layer stands for its share.
    """
    size = options.recompute_num_layers
    if options.recompute != "full" or size is None or num_layers == 0:
        return layer
    whole = layer.kept + layer.remade
    if options.recompute_method == "uniform":
        size = min(size, num_layers)
        return layer._replace(kept=layer.kept // size, remade=size * whole - layer.kept)
    num_recomputed = min(size, num_layers)
    kept = (num_recomputed * layer.kept + (num_layers - num_recomputed) * whole) // num_layers
    return layer._replace(kept=kept, remade=layer.remade if num_recomputed else 0)


def _count_kinds(model: ModelShape, kinds: Sequence[ModelShape], chunk: LayerRange) -> tuple[int, ...]:
    """How many layers of each kind of the model a chunk has."""
    if model.is_uniform:
        return (chunk.num_layers,)
    counts = dict(model.split_kinds(chunk.list_layers()))
    return tuple(counts.get(kind, 0) for kind in kinds)


def _add_mtp_layers(model: ModelShape, kinds: Sequence[ModelShape], counts: tuple[int, ...]) -> tuple[int, ...]:
    """The layers of the last chunk and those behind it, which predict further tokens."""
    further = dict(list_mtp_kinds(model))
    return tuple(count + further.get(kind, 0) for kind, count in zip(kinds, counts, strict=True))


def _select_worst_moment(layers: Sequence[LayerActivations], kept: int, head: HeadMemory | None) -> _Moment:
    """The moment that needs most: a layer's backward pass with all micro-batches in flight, the loss or the head's.

    layers: one of each kind that the stage has. kept: bytes between the forward and the backward pass.
    """
    moments = [_Moment(kept + layer.remade, 0, layer.transient) for layer in layers] or [_Moment(kept, 0, 0)]
    if head is not None:
        moments.append(_Moment(kept + head.kept, head.loss_logits, head.loss_transient))
        moments.append(_Moment(kept + head.kept, head.backward_logits, head.backward_transient))
    return max(moments, key=sum)


def _build_stages(
    model: ModelShape,
    layout: ParallelLayout,
    options: MemoryOptions,
    peaks: tuple[_StagePeak, ...],
    context_bytes: int,
    fragmentation_ratio: float,
) -> tuple[StageMemory, ...]:
    states = {
        kind: estimate_state(
            model,
            layout,
            options,
            kinds=_split_stage(model, kind),
            is_first_stage=kind.is_first,
            is_last_stage=kind.is_last,
        )
        for kind in {peak.kind for peak in peaks}
    }
    return tuple(_build_stage(peak, states[peak.kind], context_bytes, fragmentation_ratio) for peak in peaks)


def _split_stage(model: ModelShape, kind: _StageKind) -> list[tuple[ModelShape, int]]:
    kinds = list(zip((layer for layer, _ in model.split_kinds()), kind.counts, strict=True))
    return [(layer, num_layers) for layer, num_layers in kinds if num_layers] or kinds[:1]


def _build_stage(peak: _StagePeak, state: StageState, context_bytes: int, fragmentation_ratio: float) -> StageMemory:
    moment = peak.moment
    return StageMemory(
        pp_rank=peak.pp_rank,
        num_layers=peak.kind.num_layers,
        num_in_flight=peak.num_in_flight,
        weights_bytes=state.weights,
        gradients_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        buffers_bytes=state.buffers,
        activations_bytes=moment.activations,
        logits_bytes=moment.logits,
        transient_bytes=moment.transient,
        context_bytes=context_bytes,
        fragmentation_bytes=round(fragmentation_ratio * sum(moment)),
        host_bytes=peak.host + state.host,
    )
