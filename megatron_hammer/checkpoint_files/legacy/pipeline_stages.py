"""Where the layers of each pipeline stage belong: a legacy checkpoint counts them from 0 on every rank.

A micro-batch passes chunk 0 of every stage, then chunk 1 of every stage; so the number of layers that each chunk holds
says all. It must be the number that Megatron gives it, where the arguments say that.
"""

from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint_files.legacy.names import select_layer, translate_name
from megatron_hammer.checkpoint_files.legacy.rank_files import RankFile
from megatron_hammer.errors import CheckpointError, ConfigError
from megatron_hammer.model.layout import ParallelLayout
from megatron_hammer.model.pipeline_split import split_layers


def count_layers_before(directory: Path, files: list[RankFile], args: Any) -> list[list[int]]:
    """How many layers of the model come before each chunk: result[pp_rank][vp_stage].

    Raises CheckpointError if ranks of a stage differ in their chunks or layers, or the layers are not the model's.
    """
    held: dict[int, list[int]] = {}
    problems: list[str] = []
    for file in files:
        counts = [_count_layers(file, chunk, problems) for chunk in file.chunks]
        # Tensor- and expert-parallel ranks of a stage hold parts of the same layers.
        if held.setdefault(file.rank.pp, counts) != counts:
            problems.append(
                f"{file.path}: layers must be those of the other ranks of its stage, {held[file.rank.pp]} in each "
                f"chunk, got {counts}. Files of two checkpoints are mixed; copy it again."
            )
    stages = [held[pp_rank] for pp_rank in sorted(held)]
    num_layers = sum(map(sum, stages))
    expected = _split_by_arguments(args, len(stages), len(stages[0]))
    if num_layers != args.num_layers or len({len(counts) for counts in stages}) > 1:
        problems.append(
            f"{directory}: stages must hold num_layers={args.num_layers} layers in all, got {stages}. "
            "Files of two checkpoints are mixed; copy it again."
        )
    elif expected is not None and stages != expected:
        problems.append(
            f"{directory}: stages must hold {expected} layers, as the arguments say, got {stages}. "
            "Files of two checkpoints are mixed; copy it again."
        )
    if problems:
        raise CheckpointError(*problems)
    before, next_layer = [[0] * len(counts) for counts in stages], 0
    # Chunk by chunk, then stage by stage: the order in which a micro-batch passes the layers.
    for vp_stage in range(len(stages[0])):
        for pp_rank, counts in enumerate(stages):
            before[pp_rank][vp_stage] = next_layer
            next_layer += counts[vp_stage]
    return before


def _count_layers(file: RankFile, chunk: dict[str, Any], problems: list[str]) -> int:
    # A set: every layer has several tensors.
    layers = {layer for name in chunk if (layer := select_layer(translate_name(name))) is not None}
    if layers != set(range(len(layers))):
        problems.append(
            f"{file.path}: layers of a chunk must be counted from 0, got {sorted(layers)}. "
            "Load the checkpoint with the Megatron that wrote it and save it again."
        )
    return len(layers)


def _split_by_arguments(args: Any, pp: int, vp: int) -> list[list[int]] | None:
    """Megatron's split; None where the arguments describe it in a way that only the files can tell."""
    if getattr(args, "pipeline_model_parallel_layout", None) or getattr(args, "standalone_embedding_stage", False):
        return None
    layout = ParallelLayout(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        num_layers_first_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_last_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
        accounts_for_embedding=getattr(args, "account_for_embedding_in_pipeline_split", False),
        accounts_for_loss=getattr(args, "account_for_loss_in_pipeline_split", False),
    )
    try:
        split = split_layers(args.num_layers, layout)
    except ConfigError:  # a split of an older Megatron that the present one refuses
        return None
    return [[chunk.num_layers for chunk in stage] for stage in split]
