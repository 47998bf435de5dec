"""Supervised fine-tuning as arguments: the recipe behind --sft, and what follows from it. No torch, no megatron."""

import argparse
import math
from typing import Any

from megatron_hammer.config.data_flags import read_data_plan
from megatron_hammer.config.read_plan import read_data_flags, read_sft
from megatron_hammer.config.run_plan import build_row_layout
from megatron_hammer.data.conversations.counts import count_rows
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


def drop_sft_length(namespace: argparse.Namespace, typed: frozenset[str]) -> None:
    """A typed length of the run or of its warm-up replaces the recipe's."""
    if typed & {"train_iters", "train_samples"} and "sft_epochs" not in typed:
        namespace.sft_epochs = None
    if typed & {"lr_warmup_iters", "lr_warmup_samples"} and "lr_warmup_fraction" not in typed:
        namespace.lr_warmup_fraction = None


def derive_sft(namespace: argparse.Namespace) -> None:
    """Steps from epochs, and the loss per learned token."""
    # The sum over the learned tokens of all ranks and micro-batches, divided by their number.
    namespace.calculate_per_token_loss = True
    if namespace.sft_epochs is not None and namespace.train_iters is None and namespace.train_samples is None:
        namespace.train_iters = _count_steps(namespace)


def _count_steps(namespace: argparse.Namespace) -> int | None:
    """Steps of so many epochs; None where the data cannot be read or the sizes make no sense, which preflight says."""
    sft, epochs = read_sft(namespace), namespace.sft_epochs
    sizes = (namespace.seq_length, namespace.global_batch_size, namespace.context_parallel_size)
    if sft is None or None in sizes or min(sizes) < 1 or not 0 < epochs < math.inf:
        return None
    layout = build_row_layout(sft, namespace.seq_length, namespace.context_parallel_size)
    sources, problems = read_data_plan(read_data_flags(namespace))
    if problems:
        return None
    try:
        rows = [
            count_rows(source.prefix, sources.bounds_of("train"), layout).num_rows
            for source in sources.sources_of("train")
        ]
    except (DataError, OSError):
        return None
    return math.ceil(epochs * sum(rows) / namespace.global_batch_size) if rows else None
