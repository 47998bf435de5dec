"""What one micro-batch costs on each chunk of a pipeline, by the parts of StepTime: the numbers of StepCosts.

`trace.py` draws them. The parts of a stage's chunks add up to its StageCost and its sends.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_hammer.scaling.cost.compute import PassTime
from megatron_hammer.scaling.cost.layer_cost import list_layer_kinds
from megatron_hammer.scaling.cost.pipeline import count_kinds, list_chunk_layers
from megatron_hammer.scaling.cost.step_time import StageCost, StepCosts
from megatron_hammer.scaling.plan import Plan
from megatron_hammer.scaling.timeline.schedule import Pass


class StageChunk(NamedTuple):
    """Seconds of one micro-batch through one chunk of a stage, by the parts of StepTime."""

    layers: list[int]  # a layer for further tokens (MTP) has the number of the last layer
    forward: dict[str, float]
    backward: dict[str, float]


def list_stage_chunks(plan: Plan, costs: StepCosts) -> list[list[StageChunk]]:
    """The chunks of every pipeline rank. The parts of a stage's chunks add up to its StageCost and its sends."""
    split = list_chunk_layers(plan.model.num_layers, plan.layout, plan.model.num_mtp_layers)
    _, layer_kinds = list_layer_kinds(plan.model)
    return [_build_chunks(rank, split, layer_kinds, costs) for rank in range(len(split))]


def _build_chunks(
    rank: int, split: Sequence[Sequence[list[int]]], layer_kinds: tuple[int, ...], costs: StepCosts
) -> list[StageChunk]:
    stage = _find_stage(rank, split, layer_kinds, costs)
    pairs = []
    for position, layers in enumerate(split[rank]):
        has_embedding = rank == 0 and position == 0
        has_head = rank == len(split) - 1 and position == len(split[rank]) - 1
        ends = [end for end, is_here in ((costs.embedding, has_embedding), (costs.head, has_head)) if is_here]
        counts = count_kinds(layers, layer_kinds) or (len(layers),)
        pairs.append(
            (
                _list_forward_parts(counts, [end.forward for end in ends], costs),
                _list_backward_parts(counts, [end.backward for end in ends], costs),
            )
        )
    whole_s = sum(sum(side.values()) for pair in pairs for side in pair)
    # Besides its layers and ends, a stage waits for FSDP and for the host. StageCost shares that over both passes in
    # proportion to their length, and the chunks do the same here.
    fsdp_s, host_s = sum(map(len, split[rank])) * costs.fsdp_s, stage.total_s - stage.device_s
    chunks = []
    for layers, parts in zip(split[rank], pairs, strict=True):
        for side in parts:
            share = sum(side.values()) / whole_s
            side["data_parallel_s"] = share * fsdp_s
            side["overhead_s"] += share * host_s
            side["pipeline_p2p_s"] = costs.send_s / (2 * len(pairs))
        chunks.append(StageChunk(layers, *parts))
    return chunks


def _find_stage(
    rank: int, split: Sequence[Sequence[list[int]]], layer_kinds: tuple[int, ...], costs: StepCosts
) -> StageCost:
    layers = [layer for chunk in split[rank] for layer in chunk]
    key = (len(layers), rank == 0, rank == len(split) - 1)
    counts = count_kinds(layers, layer_kinds)
    return next(
        stage
        for kind, stage in zip(costs.kinds, costs.stages, strict=True)
        if kind[:3] == key and kind.kind_counts == counts
    )


def _list_forward_parts(counts: tuple[int, ...], ends: list[PassTime], costs: StepCosts) -> dict[str, float]:
    """counts: layers of each kind."""
    pairs = list(zip(counts, costs.layer_costs, strict=True))
    return {
        "embedding_and_loss_s": sum(end.device_s for end in ends),
        **_list_layer_parts([(count, layer.time.forward) for count, layer in pairs]),
        "tensor_parallel_s": sum(count * layer.tensor_forward_s for count, layer in pairs),
        "context_parallel_s": sum(count * layer.context_forward_s for count, layer in pairs),
        "expert_parallel_s": sum(count * layer.expert_forward_s for count, layer in pairs),
    }


def _list_backward_parts(counts: tuple[int, ...], ends: list[PassTime], costs: StepCosts) -> dict[str, float]:
    pairs = list(zip(counts, costs.layer_costs, strict=True))
    return {
        "recompute_s": sum(count * layer.recompute.device_s for count, layer in pairs),
        "embedding_and_loss_s": sum(end.device_s for end in ends),
        **_list_layer_parts([(count, layer.time.backward) for count, layer in pairs]),
        "tensor_parallel_s": sum(count * layer.tensor_backward_s for count, layer in pairs),
        "context_parallel_s": sum(count * layer.context_backward_s for count, layer in pairs),
        "expert_parallel_s": sum(count * layer.expert_backward_s for count, layer in pairs),
    }


def _list_layer_parts(pairs: list[tuple[int, PassTime]]) -> dict[str, float]:
    return {
        "matmul_s": sum(count * time.matmul_s for count, time in pairs),
        "attention_s": sum(count * time.attention_s for count, time in pairs),
        "pointwise_s": sum(count * time.pointwise_s for count, time in pairs),
        "overhead_s": sum(count * time.gap_s for count, time in pairs),
    }


def select_parts(chunks: Sequence[StageChunk], work: Pass) -> dict[str, float]:
    chunk = chunks[work.chunk]
    return chunk.forward if work.is_forward else chunk.backward


def find_slowest_rank(plan: Plan, costs: StepCosts) -> int:
    """The first pipeline rank of the kind that sets the pace."""
    split = list_chunk_layers(plan.model.num_layers, plan.layout, plan.model.num_mtp_layers)
    _, layer_kinds = list_layer_kinds(plan.model)
    slowest = costs.stages[costs.schedule.slowest]
    return next(rank for rank in range(len(split)) if _find_stage(rank, split, layer_kinds, costs) is slowest)
