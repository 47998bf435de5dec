"""The parallel layout of a table row: from its cells, from other rows of its source, and from its source's software.

Layers that cannot be split evenly are split as Megatron can: with the embedding and the loss counted as layers, or with
a shorter last stage.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_hammer.model.accounting import (
    ParallelLayout,
    find_grid_problems,
    find_shard_problems,
    find_split_problems,
)
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.scaling.published.row_model import UnpredictableError
from megatron_hammer.scaling.published.row_words import name_sharding
from megatron_hammer.scaling.published.run_table import RunRow
from megatron_hammer.scaling.published.software import TrainingSoftware


def name_source_family(source: str) -> str:
    """The source without its version or table. Rows of two versions are nearly the same, and count as one source."""
    bare = re.sub(r"[_-]v?\d+(\.\d+)+$", "", source)
    return re.sub(r"_(weak|strong|flops|modelparallel|dataparallel)$", "", bare)


@dataclass(frozen=True, slots=True)
class Siblings:
    """What the other rows of a file say, by source and model, for rows that leave it blank."""

    layouts: dict[tuple[str, str], set[tuple[int, int]]]  # (tp, pp)
    chunks: dict[tuple[str, str, int, int], set[int]]  # vpp, by source family, model, tp and pp


def collect_siblings(rows: Sequence[RunRow]) -> Siblings:
    """What each source of a file says about each of its models."""
    siblings = Siblings({}, {})
    for row in rows:
        if row.tp is not None and row.pp is not None:
            siblings.layouts.setdefault((row.source, row.model), set()).add((row.tp, row.pp))
            if row.vpp is not None:
                key = (name_source_family(row.source), row.model, row.tp, row.pp)
                siblings.chunks.setdefault(key, set()).add(row.vpp)
    return siblings


def build_row_layout(
    row: RunRow, model: ModelShape, software: TrainingSoftware, siblings: Siblings, assumptions: list[str]
) -> ParallelLayout:
    """The layout of a row and its model. Raises UnpredictableError if it is not stated or cannot be built."""
    tp, pp = _fill_model_parallel(row, siblings, assumptions)
    cp = row.cp or 1
    dp = row.dp
    # Some sources count context-parallel ranks as data-parallel ones.
    if dp is not None and cp > 1 and row.gpus == tp * pp * dp and dp % cp == 0:
        dp //= cp
        assumptions.append(f"dp {dp}: the row's {row.dp} counts the context-parallel ranks")
    if row.gpus is None and dp is None:
        raise UnpredictableError("gpus and dp are blank")
    if dp is None:
        assert row.gpus is not None
        if row.gpus % (tp * pp * cp):
            raise UnpredictableError(f"its {row.gpus} GPUs are no multiple of tp {tp} x pp {pp} x cp {cp}")
        dp = row.gpus // (tp * pp * cp)
    if row.gpus is not None and row.gpus != tp * pp * cp * dp:
        raise UnpredictableError(f"its {row.gpus} GPUs are not tp {tp} x pp {pp} x cp {cp} x dp {dp}")
    base = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        expert_model_parallel_size=row.ep or 1,
        expert_tensor_parallel_size=_fill_expert_tensor_parallel(row, software, assumptions),
        has_sequence_parallel=_has_sequence_parallel(row, tp, software),
    )
    vpp = _fill_chunks(row, (tp, pp), model, software, siblings, assumptions)
    layout = _split_over_stages(base, model, vpp, assumptions)
    problems = (*find_grid_problems(layout), *find_shard_problems(model, layout))
    if problems:
        raise UnpredictableError(f"its layout cannot be built: {problems[0]}")
    return layout


def _fill_expert_tensor_parallel(row: RunRow, software: TrainingSoftware, assumptions: list[str]) -> int | None:
    if row.etp is not None or row.experts is None:
        return row.etp
    size = software.expert_tensor_parallel_size
    assumptions.append(f"etp {'tp' if size is None else size}: blank, {software.name}")
    return size


def _has_sequence_parallel(row: RunRow, tp: int, software: TrainingSoftware) -> bool:
    """From the row's own cell, else from its text, else from the software.

    In the publication of 2022 the runs with full recomputation are the baseline without sequence parallelism.
    """
    if row.sequence_parallel is not None:
        return row.sequence_parallel
    text = f"{row.recompute} {row.notes}".lower()
    if re.search(r"(no|without) (sequence.parallel|sp\b)", text):
        return False
    if "sequence parallel" in text:
        return tp > 1
    return (
        software.has_sequence_parallel
        and tp > 1
        and not (software.recomputes_without_sequence_parallel and "full" in text)
    )


def _fill_model_parallel(row: RunRow, siblings: Siblings, assumptions: list[str]) -> tuple[int, int]:
    if row.tp is not None and row.pp is not None:
        return row.tp, row.pp
    if row.dp is not None and row.dp == row.gpus:
        assumptions.append("tp 1, pp 1: dp is the number of GPUs")
        return 1, 1
    if row.gpus is not None and row.dp is not None and (row.tp is None) != (row.pp is None):
        rest, remainder = divmod(row.gpus, (row.tp or row.pp or 1) * (row.cp or 1) * row.dp)
        if rest and not remainder:
            assumptions.append(f"{'tp' if row.tp is None else 'pp'} {rest}: the GPUs over the other sizes")
            return row.tp or rest, row.pp or rest
    if row.tp is None and row.pp is None and row.sharding and name_sharding(row.sharding) == "fsdp":
        assumptions.append(f"tp 1, pp 1: blank, {row.sharding} splits the model")
        return 1, 1
    same = siblings.layouts.get((row.source, row.model), set())
    if row.tp is None and row.pp is None and len(same) == 1:
        tp, pp = next(iter(same))
        if row.gpus is not None and row.gpus % (tp * pp) == 0:
            assumptions.append(f"tp {tp}, pp {pp}: the layout of the source's other row of this model")
            return tp, pp
    blank = " and ".join(name for name in ("tp", "pp", "gpus") if getattr(row, name) is None)
    raise UnpredictableError(f"{blank} blank, and nothing says how its GPUs were laid out")


def _fill_chunks(
    row: RunRow,
    sizes: tuple[int, int],
    model: ModelShape,
    software: TrainingSoftware,
    siblings: Siblings,
    assumptions: list[str],
) -> int:
    """Virtual chunks per stage. sizes: (tp, pp)."""
    if row.vpp is not None or sizes[1] == 1 or not software.is_interleaved:
        return row.vpp or 1
    same = siblings.chunks.get((name_source_family(row.source), row.model, *sizes), set())
    if len(same) == 1:
        chunks = next(iter(same))
        assumptions.append(f"vpp {chunks}: blank, that of the source's other row of this model and layout")
        return chunks
    # As `_split_over_stages` splits them: evenly, or with the embedding and the loss, or the loss, as layers.
    slots = [model.num_layers + ends for ends in (0, 2, 1) if (model.num_layers + ends) % sizes[1] == 0]
    if not slots:
        return 1
    chunks = slots[0] // sizes[1]
    assumptions.append(f"vpp {chunks}: blank, interleaved as far as it goes, as {software.name} does")
    return chunks


def _split_over_stages(base: ParallelLayout, model: ModelShape, vpp: int, assumptions: list[str]) -> ParallelLayout:
    """The first exact way to split the layers: evenly, with embedding and loss as layers, or a short last stage.

    If there is none, the layers are shared out over the chunks one by one, as recipes do with
    --pipeline-model-parallel-layout, and as nanotron always does.
    """
    num_layers = model.num_layers
    layout = replace(base, virtual_pipeline_model_parallel_size=vpp if base.pipeline_model_parallel_size > 1 else 1)
    pp = layout.pipeline_model_parallel_size
    last = num_layers - math.ceil(num_layers / pp) * (pp - 1)
    ways = [
        (layout, ""),
        (replace(layout, accounts_for_embedding=True, accounts_for_loss=True), "embedding and loss count as layers"),
        (replace(layout, accounts_for_loss=True), "the loss counts as a layer"),
    ]
    if last > 0:
        ways.append((replace(layout, num_layers_last_stage=last), f"the last stage has {last} layers"))
    for way, text in ways:
        if not find_split_problems(num_layers, way):
            if text:
                assumptions.append(f"{num_layers} layers over pp {pp}, vpp {vpp}: {text}")
            return way
    chunks = _share_out_layers(num_layers, pp * vpp, model.num_mtp_layers)
    if chunks is None:
        raise UnpredictableError(f"its {num_layers} layers cannot be split over pp {pp} and vpp {vpp}")
    assumptions.append(f"{num_layers} layers over pp {pp}, vpp {vpp}: shared out as evenly as chunks allow")
    return replace(layout, chunk_layers=chunks)


def _share_out_layers(num_layers: int, num_chunks: int, num_mtp_layers: int) -> tuple[int, ...] | None:
    """Layers of each chunk, where embedding, head and every layer for further tokens take the place of one."""
    size, larger = divmod(num_layers + 2 + num_mtp_layers, num_chunks)
    sizes = [size + (chunk < larger) for chunk in range(num_chunks)]
    sizes[0] -= 1
    sizes[-1] -= 1 + num_mtp_layers
    return tuple(sizes) if min(sizes) >= 0 else None
