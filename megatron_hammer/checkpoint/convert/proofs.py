"""What both directions of a conversion prove, and how they say that a proof failed.

Of every tensor: its values are finite in the dtype that is written, and the file, read back and put through the inverse
layout, has the bits of the source. `find_row_runs` finds the layouts that only reorder rows. For these the inverse is
proved once, on numbered rows, so that the rows themselves need only be copied and compared.
"""

import functools
import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hammer.checkpoint.hugging_face.tensor_layouts import TensorLayout
from megatron_hammer.checkpoint.hugging_face.tensor_rows import Shape, TensorPair
from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal, is_finite
from megatron_hammer.checkpoint_files.checkpoint_reader import name_dtype
from megatron_hammer.errors import ConversionError
from megatron_hammer.model.shape import ModelShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class TensorProof:
    """is_finite: of the values that were written. is_equal: what was read back is what was meant."""

    is_finite: bool
    is_equal: bool


def compare_tensors(meant: Tensor, read_back: Tensor) -> TensorProof:
    """The proof of one tensor, bit by bit."""
    return TensorProof(is_finite(meant), is_bitwise_equal(meant, read_back))


def join_proofs(proofs: Iterable[TensorProof]) -> TensorProof:
    """The proof of a tensor that was written in several parts."""
    found = list(proofs)
    return TensorProof(all(proof.is_finite for proof in found), all(proof.is_equal for proof in found))


def list_faults(
    name: str, proof: TensorProof, *, dtype: torch.dtype, source: Path, target: Path, remedy: str, written_as: str = ""
) -> list[str]:
    """A sentence for each thing that is wrong. remedy: where values of the source are not finite."""
    faults = []
    if not proof.is_finite:
        faults.append(
            f"{name}: weights must be finite in {name_dtype(dtype)}, got NaN or infinity in {source}. "
            f"{remedy}, or pass another --dtype."
        )
    if not proof.is_equal:
        faults.append(
            f"{name}: what was written{written_as and f' as {written_as}'} must read back equal, got a difference in "
            f"{target}. Check the disk; if it is sound, this is a defect of the converter."
        )
    return faults


def find_row_runs(pair: TensorPair, model: ModelShape) -> list[list[tuple[int, int]]] | None:
    """For every Hugging Face tensor of `pair` the runs (first row, number of rows) of Megatron rows it is made of.

    None if the layout does more than reorder rows, or its inverse does not bring every row back.
    """
    return _find_runs_of_layout(pair.layout, pair.megatron_shape, pair.hf_shapes, model)


# Layouts, shapes and models can be hashed: all are frozen dataclasses or tuples.
@functools.lru_cache(maxsize=64)  # the layers of a model have the same few
def _find_runs_of_layout(
    layout: TensorLayout, shape: Shape, hf_shapes: tuple[Shape, ...], model: ModelShape
) -> list[list[tuple[int, int]]] | None:
    # One element per row is enough to see where a row goes. A layout that also moves columns gives a part of another
    # shape than expected, and the caller then compares the tensor whole.
    # Axes of size 1 in place of the columns: the layout's reshapes then work on the numbers as on a real tensor.
    numbers = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    parts = layout.split(numbers, model)
    for part, hf_shape in zip(parts, hf_shapes, strict=True):
        if part.shape != (len(part), *numbers.shape[1:]) or hf_shape != (len(part), *shape[1:]):
            return None
    # A layout that also computes, or drops rows, cannot bring the numbers back.
    if not torch.equal(layout.merge(parts, model), numbers):
        return None
    return [_find_runs(part.reshape(-1)) for part in parts]


def _find_runs(numbers: Tensor) -> list[tuple[int, int]]:
    """[4, 5, 6, 0, 1] -> [(4, 3), (0, 2)]."""
    breaks = (torch.nonzero(numbers.diff() != 1).view(-1) + 1).tolist()
    edges = [0, *breaks, len(numbers)]
    return [(int(numbers[first]), last - first) for first, last in itertools.pairwise(edges)]


def stacks_rows(pair: TensorPair, model: ModelShape) -> bool:
    """Whether the layout puts the Hugging Face tensors whole, one under the other."""
    first_rows = itertools.accumulate((shape[0] for shape in pair.hf_shapes), initial=0)
    # strict=False: accumulate gives one number more than there are shapes, the end.
    stacked = [[(first_row, shape[0])] for first_row, shape in zip(first_rows, pair.hf_shapes, strict=False)]
    return find_row_runs(pair, model) == stacked


def require_free_space(target: Path, num_bytes: int) -> None:
    """Raise ConversionError unless the disk of `target`, which may not exist yet, has room for the weights."""
    # disk_usage needs a path that exists. The root always does.
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes:
        raise ConversionError(
            f"{target}: disk must have {num_bytes:,} bytes free for the weights, got {free_bytes:,}. "
            "Free space, or choose another --save."
        )


def require_ids_in_vocabulary(tokenizer: Path, *, num_ids: int, vocab_size: int, remedy: str) -> None:
    """Raise ConversionError if the tokenizer has ids for which the model has no row."""
    if num_ids > vocab_size:
        raise ConversionError(
            f"{tokenizer}: tokenizer must not have more ids than the model, got {num_ids} ids, "
            f"vocab_size={vocab_size}. {remedy}"
        )


def require_passed(checks: Iterable[CheckRow], *, requirement: str, consequence: str) -> None:
    """Raise ConversionError with a sentence for every failed check."""
    # None is "not done", with the reason in the table; it is no failure.
    failed = [check for check in checks if check.is_passed is False]
    if failed:
        raise ConversionError(*(f"{requirement}, got {check.check}: {check.result}. {consequence}" for check in failed))
