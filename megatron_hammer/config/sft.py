"""Supervised fine-tuning as arguments: the recipe behind --sft, and the steps of its epochs. No torch, no megatron."""

import math
from typing import Any

from megatron_hammer.config.run_plan import Sft, build_row_layout
from megatron_hammer.data.conversations.counts import count_rows
from megatron_hammer.data.sources import DataPlan
from megatron_hammer.errors import DataError
from megatron_hammer.presets.preset import SftRecipe


def sft_arguments(recipe: SftRecipe) -> dict[str, Any]:
    """What --sft sets over a preset; flags on the command line replace it."""
    return {
        "micro_batch_size": recipe.micro_batch_size,
        "global_batch_size": recipe.global_batch_size,
        "train_iters": None,
        "sft_epochs": recipe.num_epochs,
        "lr": recipe.lr,
        "min_lr": recipe.min_lr,
        "lr_decay_style": recipe.lr_decay_style,
        "lr_warmup_iters": 0,
        "lr_warmup_fraction": recipe.lr_warmup_fraction,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.adam_beta2,
    }


def count_sft_steps(
    sft: Sft, sources: DataPlan, *, seq_length: int, global_batch_size: int, context_parallel_size: int
) -> int | None:
    """Steps of its epochs; None where the data cannot be read or the sizes make no sense, which preflight says."""
    epochs = sft.num_epochs
    if epochs is None or not 0 < epochs < math.inf or min(seq_length, global_batch_size, context_parallel_size) < 1:
        return None
    layout = build_row_layout(sft, seq_length, context_parallel_size)
    try:
        rows = [
            count_rows(source.prefix, sources.bounds_of("train"), layout).num_rows
            for source in sources.sources_of("train")
        ]
    except (DataError, OSError):
        return None
    # No rows: preflight names the split that has none.
    return math.ceil(epochs * sum(rows) / global_batch_size) or None if rows else None
