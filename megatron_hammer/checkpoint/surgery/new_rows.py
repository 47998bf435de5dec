"""The rows of new tokens, by one algorithm for Hugging Face folders and Megatron's checkpoints.

The row of a new piece is the mean of the rows of the old pieces that spell it, computed in fp32 and stored in the
matrix's dtype. A new token that no old piece spells (a byte, or one without a piece) gets the mean of all old rows.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.errors import ConversionError
from megatron_hammer.tokenizer.encoding.encoder import Encoder, load_encoder
from megatron_hammer.tokenizer.vocabulary.extension import validate_extension

MAX_PADDING_ROWS = 1024  # a vocabulary is padded to a multiple of at most that; more means another tokenizer
_BLOCK_ROWS = 4096  # bounds the fp64 copy: 64 MiB at hidden size 2048


def load_extension(old_path: Path, new_path: Path, *, num_rows: int, rows: str, remedy: str) -> tuple[Encoder, Encoder]:
    """The model's tokenizer and the one that extends it. rows: how messages name the model's `num_rows` rows.

    Raises DataError if the tokenizers do not fit each other, ConversionError if the old one is not the model's.
    """
    old, new = load_encoder(old_path), load_encoder(new_path)
    validate_extension(old, new)
    if not 0 <= num_rows - old.vocab_size <= MAX_PADDING_ROWS:
        raise ConversionError(
            f"{old.path}: old tokenizer must be the model's, with at most {MAX_PADDING_ROWS:,} rows of padding, got "
            f"{old.vocab_size:,} pieces for {rows}. {remedy}"
        )
    return old, new


def build_new_rows(old_rows: Tensor, spellings: Sequence[Sequence[int]]) -> Tensor:
    """One row for each spelling: the mean of the old rows that it names, or of all of them where it names none.

    old_rows: [pieces, h], of any float dtype. Returns [spellings, h] in the same dtype.
    """
    rows = torch.empty(len(spellings), old_rows.shape[1], dtype=old_rows.dtype)
    unspelled = [number for number, ids in enumerate(spellings) if not ids]
    # Computed only if a row needs it, because it reads the whole matrix.
    if unspelled:
        rows[unspelled] = mean_of_all(old_rows)
    for row, ids in zip(rows, spellings, strict=True):
        if ids:
            # fp32: a sum of bf16 rows would be rounded at every addition.
            row.copy_(old_rows[list(ids)].float().mean(dim=0))
    return rows


def mean_of_all(rows: Tensor) -> Tensor:
    """The mean [h] of all rows [n, h], summed in fp64 block by block and rounded once to their dtype."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(_BLOCK_ROWS):
        total += block.double().sum(dim=0)
    return (total / max(rows.shape[0], 1)).to(rows.dtype)  # an empty matrix has no mean; 1 avoids a division by zero
