"""The schedule of a pipeline: what one micro-batch costs on each stage, and what filling and draining adds.

Source: Narayanan et al. 2021, arXiv 2104.04473, sections 2.2.1 and 2.2.2. Stages are uneven: the first has the
embedding, the last the head and the loss. The slowest stage sets the pace.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_hammer.model.accounting import ParallelLayout, split_layers


class StageKind(NamedTuple):
    """`num_stages` identical stages: their number of layers, and whether they have one of the model's ends.

    kind_counts: layers of each kind of a model whose layers are not all alike; empty otherwise.
    """

    num_layers: int
    has_embedding: bool
    has_head: bool
    num_stages: int
    kind_counts: tuple[int, ...] = ()


class Schedule(NamedTuple):
    """Seconds of one step's passes on the slowest stage, and what its rank waits for the others."""

    slowest: int  # index of the slowest kind of stage
    bubble_s: float
    imbalance_s: float  # per micro-batch: how much longer the slowest stage works than the mean of all


@lru_cache(maxsize=4096)
def list_stages(
    num_layers: int,
    pp: int,
    vp: int,
    first: int | None,
    last: int | None,
    accounts_for_embedding: bool,
    accounts_for_loss: bool,
    chunk_layers: tuple[int, ...] | None = None,
    layer_kinds: tuple[int, ...] = (),
    num_mtp_layers: int = 0,
) -> tuple[StageKind, ...]:
    """The kinds of stages of a layout. Raises ConfigError if the layers cannot be split that way.

    layer_kinds: the kind of every layer, from 0; empty if all are alike. num_mtp_layers: layers behind the last one,
    which are on the last stage and of the last layer's kind.
    """
    layout = ParallelLayout(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        num_layers_first_stage=first,
        num_layers_last_stage=last,
        accounts_for_embedding=accounts_for_embedding,
        accounts_for_loss=accounts_for_loss,
        chunk_layers=chunk_layers,
    )
    counts: dict[tuple[int, bool, bool, tuple[int, ...]], int] = {}
    for pp_rank, chunks in enumerate(list_chunk_layers(num_layers, layout, num_mtp_layers)):
        layers = [layer for chunk in chunks for layer in chunk]
        key = (len(layers), pp_rank == 0, pp_rank == pp - 1, count_kinds(layers, layer_kinds))
        counts[key] = counts.get(key, 0) + 1
    return tuple(StageKind(*key[:3], count, key[3]) for key, count in counts.items())


def list_chunk_layers(num_layers: int, layout: ParallelLayout, num_mtp_layers: int) -> list[list[list[int]]]:
    """The layers of every chunk of every pipeline rank, from 0. Layers behind the last one have its number."""
    split = [[list(chunk.list_layers()) for chunk in chunks] for chunks in split_layers(num_layers, layout)]
    split[-1][-1] += [num_layers - 1] * num_mtp_layers
    return split


def count_kinds(layers: Sequence[int], layer_kinds: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the layers are of each kind; empty if all are alike."""
    kinds = [layer_kinds[layer] for layer in layers] if layer_kinds else []
    return tuple(kinds.count(kind) for kind in range(max(layer_kinds, default=-1) + 1))


def build_schedule(stage_s: list[float], counts: list[int], num_chunks: int) -> Schedule:
    """stage_s: forward and backward of one micro-batch on each kind of stage, `counts` of them.

    The first micro-batch passes every stage, and the others follow at the pace of the slowest stage, so a step takes
    m * slowest + (sum of all stages - slowest) seconds. With v interleaved chunks, filling takes only 1 / v of that.
    """
    slowest = max(range(len(stage_s)), key=stage_s.__getitem__)
    passed = sum(seconds * count for seconds, count in zip(stage_s, counts, strict=True))
    mean = passed / sum(counts)
    return Schedule(slowest, (passed - stage_s[slowest]) / num_chunks, stage_s[slowest] - mean)
