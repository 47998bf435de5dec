"""Which pipeline stage holds which layers: Megatron's rules, and every case in which they cannot be exact.

Megatron checks some of this in its argument parser, some in TransformerConfig, some in asserts while the model is
built, and some nowhere: 80 layers at 16 stages of 2 chunks once trained 64 layers, silently. Here every split is either
exact or refused with a remedy, before a process starts.
"""

from typing import NamedTuple

from megatron_hammer.errors import ConfigError
from megatron_hammer.model.layout import ParallelLayout, divisors, find_grid_problems, or_list, raise_problems


class LayerRange(NamedTuple):
    """Consecutive layers of one model chunk; `num_layers` may be 0 where the embedding or the loss stands alone."""

    first_layer: int
    num_layers: int

    def list_layers(self) -> range:
        """The layers' numbers in the model, from 0."""
        return range(self.first_layer, self.first_layer + self.num_layers)


def split_layers(num_layers: int, layout: ParallelLayout) -> tuple[tuple[LayerRange, ...], ...]:
    """The layers of every pipeline stage, a range for each of its virtual chunks: result[pp_rank][vp_stage].

    Equal to megatron.core's get_num_layers_to_build and get_transformer_layer_offset, pinned by
    tests/unit/model/test_pipeline_split.py. Raises ConfigError where a split cannot hold every layer exactly once.
    """
    raise_problems(find_grid_problems(layout))
    raise_problems(find_split_problems(num_layers, layout))
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    sizes = _count_chunk_layers(num_layers, layout)
    stages: list[list[LayerRange]] = [[] for _ in range(pp)]
    next_layer = 0
    for vp_stage in range(vp):  # a micro-batch passes chunk 0 of every stage, then chunk 1 of every stage, ...
        for pp_rank in range(pp):
            size = sizes[pp_rank][vp_stage]
            stages[pp_rank].append(LayerRange(next_layer, size))
            next_layer += size
    if next_layer != num_layers:  # our own bug, not the user's: find_split_problems must have refused it
        raise AssertionError(f"split of {num_layers} layers holds {next_layer}: {layout}")
    return tuple(tuple(stage) for stage in stages)


def find_split_problems(num_layers: int, layout: ParallelLayout) -> tuple[str, ...]:
    """Every reason why this split is not exact, each a sentence with its remedy; empty if it is."""
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    is_uneven = layout.num_layers_first_stage is not None or layout.num_layers_last_stage is not None
    problems = []
    if layout.chunk_layers is not None:
        return _find_chunk_problems(num_layers, layout, layout.chunk_layers)
    if vp > 1 and pp == 1:
        problems.append(
            f"virtual-pipeline-model-parallel-size: needs more than one pipeline stage, got vp={vp}, pp=1. "
            "Pass 1, or raise --pipeline-model-parallel-size."
        )
    if is_uneven and (layout.accounts_for_embedding or layout.accounts_for_loss):
        problems.append(
            "decoder-first-pipeline-num-layers: cannot be combined with --account-for-embedding-in-pipeline-split or "
            f"--account-for-loss-in-pipeline-split, got first={layout.num_layers_first_stage}, "
            f"last={layout.num_layers_last_stage}. Use one way or the other."
        )
    elif is_uneven:
        problems += _find_uneven_problems(num_layers, layout)
    else:
        problems += _find_even_problems(num_layers, layout)
    return tuple(problems)


def _find_chunk_problems(num_layers: int, layout: ParallelLayout, sizes: tuple[int, ...]) -> tuple[str, ...]:
    num_chunks = layout.pipeline_model_parallel_size * layout.virtual_pipeline_model_parallel_size
    if len(sizes) == num_chunks and sum(sizes) == num_layers and min(sizes) >= 0:
        return ()
    return (
        f"pipeline-model-parallel-layout: must share {num_layers} layers out to {num_chunks} chunks, got {len(sizes)} "
        f"chunks of {sum(sizes)} layers. Give the layers of every chunk.",
    )


def _find_even_problems(num_layers: int, layout: ParallelLayout) -> list[str]:
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    extra = int(layout.accounts_for_embedding) + int(layout.accounts_for_loss)
    slots = num_layers + extra
    counted = f"num_layers={num_layers}" + (f" + {extra} for embedding and loss" if extra else "")
    if slots % pp:
        return [
            f"pipeline-model-parallel-size: must divide num_layers, got pp={pp}, {counted}. "
            f"Use {or_list(divisors(slots))}, or pass --decoder-first-pipeline-num-layers."
        ]
    per_stage = slots // pp
    if per_stage % vp:
        kept = per_stage // vp * vp * pp
        return [
            f"virtual-pipeline-model-parallel-size: must divide the {per_stage} layers of a stage, got vp={vp}, "
            f"pp={pp}, {counted} (rounding down would build {kept} of {slots}). Use {or_list(divisors(per_stage))}."
        ]
    needed = 2 if extra == 2 and pp * vp == 1 else int(extra > 0)
    if per_stage // vp < needed:
        return [f"num_layers: must be at least 1 a stage, got pp={pp}, vp={vp}, {counted}. Use fewer stages."]
    return []


def _find_uneven_problems(num_layers: int, layout: ParallelLayout) -> list[str]:
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    named = {
        "decoder-first-pipeline-num-layers": layout.num_layers_first_stage,
        "decoder-last-pipeline-num-layers": layout.num_layers_last_stage,
    }
    given = {flag: size for flag, size in named.items() if size is not None}
    if pp == 1:
        return [f"{flag}: needs more than one pipeline stage, got pp=1. Drop it." for flag in given]
    problems = []
    for flag, size in given.items():
        if size < 1:
            problems.append(f"{flag}: must be at least 1, got {size}. Drop it for an even split.")
        elif size % vp:
            problems.append(
                f"{flag}: must be a multiple of the {vp} virtual chunks, got {size}. Use {size // vp * vp + vp}."
            )
    if vp > 1 and pp == len(given):
        # megatron-core 0.19.2 divides by its number of middle stages, get_transformer_layer_offset.
        problems.append(
            "decoder-last-pipeline-num-layers: cannot be given beside the first on two interleaved stages, "
            f"got vp={vp}. Drop it: it follows from the first."
        )
    middle_layers, middle_stages = num_layers - sum(given.values()), pp - len(given)
    split = ", ".join(f"{flag.split('-')[1]}={size}" for flag, size in given.items())
    facts = f"got num_layers={num_layers}, {split}, leaving {middle_layers} for {middle_stages} stages"
    flags = " and ".join(f"--{flag}" for flag in given)
    if middle_layers < 0 or (middle_layers == 0) != (middle_stages == 0):
        problems.append(f"num_layers: every layer needs one stage and every stage one layer, {facts}. Change {flags}.")
    elif middle_stages and middle_layers % (middle_stages * vp):
        block = f"{middle_stages} stages" + (f" x {vp} chunks" if vp > 1 else "")
        problems.append(f"num_layers: the middle layers must divide over {block}, {facts}. Change {flags}.")
    return problems


def _count_chunk_layers(num_layers: int, layout: ParallelLayout) -> list[list[int]]:
    """Layers of each chunk, [pp_rank][vp_stage]; the split is known to be exact."""
    pp, vp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if layout.chunk_layers is not None:
        return [[layout.chunk_layers[chunk * pp + pp_rank] for chunk in range(vp)] for pp_rank in range(pp)]
    first, last = layout.num_layers_first_stage, layout.num_layers_last_stage
    if first is not None or last is not None:
        middle_stages = pp - (first is not None) - (last is not None)
        middle = (num_layers - (first or 0) - (last or 0)) // middle_stages if middle_stages else 0
        per_stage = [middle] * pp
        if first is not None:
            per_stage[0] = first
        if last is not None:
            per_stage[-1] = last
        return [[size // vp] * vp for size in per_stage]
    slots = num_layers + int(layout.accounts_for_embedding) + int(layout.accounts_for_loss)
    sizes = [[slots // pp // vp] * vp for _ in range(pp)]
    if layout.accounts_for_embedding:  # the embedding takes the place of a layer in the very first chunk
        sizes[0][0] -= 1
    if layout.accounts_for_loss:
        sizes[-1][-1] -= 1
    return sizes


def select_stage(num_layers: int, layout: ParallelLayout, pp_rank: int) -> tuple[LayerRange, ...]:
    """One stage of the split; ConfigError for a stage that the layout does not have."""
    if not 0 <= pp_rank < layout.pipeline_model_parallel_size:
        raise ConfigError(
            f"pp_rank: must be a pipeline stage, got pp_rank={pp_rank}, pp={layout.pipeline_model_parallel_size}. "
            f"Use 0 to {layout.pipeline_model_parallel_size - 1}."
        )
    return split_layers(num_layers, layout)[pp_rank]
