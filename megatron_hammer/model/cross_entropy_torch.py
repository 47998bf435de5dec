"""The work of cross_entropy.py on rows of logits in PyTorch, one block of rows after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of a block: 1 MiB in fp32, which a core keeps in its cache over the operations on it.
BLOCK_ELEMENTS = 2**18


def reduce_rows(rows: Tensor, targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of n rows [n, c], over its first num_columns: the maximum, the sum of exp(logit - maximum), the target.

    targets [n]: columns; one that is not among the first num_columns gives the target logit 0. Returns three tensors
    [n] in fp32, or fp64 for fp64 logits. Without columns the maximum is -inf and the sum 0.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    maxima = torch.full((len(rows),), -torch.inf, dtype=dtype, device=rows.device)
    sums, target_logits = torch.zeros_like(maxima), torch.zeros_like(maxima)
    if num_columns == 0:
        return maxima, sums, target_logits
    columns = targets.clamp(0, num_columns - 1)
    target_logits = torch.where(columns == targets, rows.gather(1, columns[:, None])[:, 0].to(dtype), 0.0)
    for block in _iterate_blocks(rows):
        logits = rows[block, :num_columns].to(dtype)
        maxima[block] = logits.amax(dim=1)
        # A row of nothing but -inf has the sum 0 and not NaN: another rank may have finite logits of it.
        shifts = maxima[block].clamp(min=torch.finfo(dtype).min)
        sums[block] = (logits - shifts[:, None]).exp_().sum(dim=1)
    return maxima, sums, target_logits


def write_gradient(
    rows: Tensor, targets: Tensor, num_columns: int, maxima: Tensor, sums: Tensor, scales: Tensor
) -> None:
    """Overwrite rows [n, c] with scale x (probability - 1 at the target), and with 0 from num_columns on.

    maxima, sums, scales [n]: of the whole rows, over all ranks; sums are of exp(logit - maximum).
    """
    rows[:, num_columns:] = 0
    if num_columns == 0:
        return
    columns = targets.clamp(0, num_columns - 1)
    at_target = torch.where(columns == targets, -scales, 0.0)
    for block in _iterate_blocks(rows):
        gradient = (rows[block, :num_columns].to(maxima.dtype) - maxima[block, None]).exp_()
        gradient *= (scales[block] / sums[block])[:, None]
        gradient.scatter_add_(1, columns[block, None], at_target[block, None])
        rows[block, :num_columns] = gradient


def _iterate_blocks(rows: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), size):
        yield slice(start, start + size)
