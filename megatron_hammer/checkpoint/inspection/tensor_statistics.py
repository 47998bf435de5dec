"""Statistics of a tensor: range, mean, spread, and how many elements are not finite. Reads it piece by piece."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorStatistics:
    """Of the finite elements; NaN where there are none. std divides by their number, not one less."""

    num_elements: int
    min: float
    max: float
    mean: float
    std: float
    num_nan: int
    num_infinite: int
    num_zero: int


def measure_tensor(tensor: Tensor) -> TensorStatistics:
    """The statistics of a floating-point or integer tensor of any shape; needs memory for a piece of it only."""
    low, high, count, mean, squares = math.inf, -math.inf, 0, 0.0, 0.0
    num_nan = num_infinite = num_zero = 0
    for piece in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS) if tensor.numel() else ():
        # fp64: sums over millions of elements in fp32 would lose digits of the mean.
        values = piece.to(torch.float64)
        is_finite = values.isfinite()
        # Rare, and each count passes over the piece again; a sound tensor pays for one pass only.
        if not is_finite.all():
            num_nan += int(values.isnan().sum())
            num_infinite += int(values.isinf().sum())
            values = values[is_finite]
        num_zero += int((values == 0).sum())
        if not len(values):
            continue
        low, high = min(low, values.min().item()), max(high, values.max().item())
        # Chan's merge of two means and sums of squared deviations.
        piece_mean = values.mean().item()
        piece_squares = ((values - piece_mean) ** 2).sum().item()
        delta, total = piece_mean - mean, count + len(values)
        squares += piece_squares + delta**2 * count * len(values) / total
        mean += delta * len(values) / total
        count = total
    is_empty = count == 0
    return TensorStatistics(
        num_elements=tensor.numel(),
        min=math.nan if is_empty else low,
        max=math.nan if is_empty else high,
        mean=math.nan if is_empty else mean,
        std=math.nan if is_empty else math.sqrt(squares / count),
        num_nan=num_nan,
        num_infinite=num_infinite,
        num_zero=num_zero,
    )
