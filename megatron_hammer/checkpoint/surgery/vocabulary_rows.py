"""The rows of the embedding and the head: tokens, then the padding for tensor parallelism."""

from argparse import Namespace

import torch
from torch import Tensor

from megatron_hammer.checkpoint.surgery.training_checkpoint import TrainingCheckpoint, parameter_key
from megatron_hammer.checkpoint_files.checkpoint_reader import VOCABULARY_TENSORS
from megatron_hammer.errors import CheckpointError
from megatron_hammer.model.accounting import padded_vocab_size


def is_vocabulary_key(key: str) -> bool:
    """Whether the tensor has one row per token, or is the optimizer's state of such a parameter."""
    return parameter_key(key) in VOCABULARY_TENSORS


def read_vocab_size(checkpoint: TrainingCheckpoint) -> int:
    """Tokens of the model, without padding. Raises CheckpointError if the arguments lack it or do not fit."""
    vocab_size: int | None = getattr(checkpoint.args, "vocab_size", None)
    rows = {key: checkpoint.model[key].shape[0] for key in VOCABULARY_TENSORS if key in checkpoint.model}
    if vocab_size is None:
        raise CheckpointError(
            f"{checkpoint.directory}: arguments must hold vocab_size, got none. "
            "Pass a checkpoint that this package's training saved."
        )
    problems = [
        f"{key}: must have at least a row for each of the {vocab_size} tokens, got {num_rows} in "
        f"{checkpoint.directory}. Its arguments are not its own; copy it again."
        for key, num_rows in rows.items()
        if num_rows < vocab_size
    ]
    if problems or not rows:
        raise CheckpointError(*(problems or [f"{checkpoint.directory}: must hold {VOCABULARY_TENSORS[0]}, got none."]))
    return vocab_size


def count_padded_rows(args: Namespace) -> int:
    """Rows of the embedding at the arguments' vocabulary and tensor-parallel size, as megatron pads them.

    Raises CheckpointError if the arguments do not say to which multiple.
    """
    divisible_by = getattr(args, "make_vocab_size_divisible_by", None)
    if not divisible_by:
        raise CheckpointError(
            "make_vocab_size_divisible_by: the checkpoint's arguments must hold it, got none. "
            "Pass a checkpoint that this package's training saved."
        )
    return padded_vocab_size(
        args.vocab_size,
        divisible_by=divisible_by,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
    )


def read_rows(
    checkpoint: TrainingCheckpoint, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], *, num_rows: int
) -> Tensor:
    """A box of a tensor of which only the first `num_rows` rows are kept; the rows after them are zeros."""
    first, wanted = offsets[0], sizes[0]
    num_kept = min(max(num_rows - first, 0), wanted)  # 0 for a box that begins after the last kept row
    if num_kept == wanted:
        return checkpoint.store.read(key, offsets, sizes)
    result = torch.zeros(sizes, dtype=checkpoint.store.tensors[key].dtype)
    if num_kept:
        result[:num_kept] = checkpoint.store.read(key, offsets, (num_kept, *sizes[1:]))
    return result
