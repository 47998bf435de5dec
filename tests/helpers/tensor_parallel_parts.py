"""What each tensor-parallel rank of an old checkpoint holds of a tensor, written by hand: the inverse of the reader."""

import re

import torch
from torch import Tensor


def split_columns(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """Column parallel: rank r holds the r-th block of rows."""
    rows = len(weight) // num_ranks
    return [weight[rank * rows : (rank + 1) * rows].clone() for rank in range(num_ranks)]


def split_rows(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """Row parallel: rank r holds the r-th block of columns."""
    columns = weight.shape[1] // num_ranks
    return [weight[:, rank * columns : (rank + 1) * columns].clone() for rank in range(num_ranks)]


def split_gated_columns(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """linear_fc1 of a gated MLP: rank r holds its rows of the gate, then its rows of up."""
    half = len(weight) // 2
    gates, ups = split_columns(weight[:half], num_ranks), split_columns(weight[half:], num_ranks)
    return [torch.cat([gates[rank], ups[rank]]) for rank in range(num_ranks)]


def split_by_name(name: str, tensor: Tensor, num_ranks: int, *, is_gated: bool) -> list[Tensor]:
    """What the ranks hold of the tensor of that mcore name."""
    if re.search(r"linear_fc1\.(weight|bias)$", name):
        return (split_gated_columns if is_gated else split_columns)(tensor, num_ranks)
    if re.search(r"(linear_qkv\.(weight|bias)|word_embeddings\.weight|output_layer\.weight)$", name):
        return split_columns(tensor, num_ranks)
    if re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        return split_rows(tensor, num_ranks)
    return [tensor] * num_ranks


def order_qkv_by_version(qkv: Tensor, *, checkpoint_version: float, head_dim: int) -> Tensor:
    """Rows of query_key_value as a checkpoint of that version keeps them, from q, k and v of one head after another."""
    heads = [part.split(head_dim) for part in qkv.split(3 * head_dim)]  # of each head its q, k and v
    if checkpoint_version == 0:  # all q, then all k, then all v
        return torch.cat([head[part] for part in range(3) for head in heads])
    if checkpoint_version == 1:  # of each head the q, k and v of one element after another
        return torch.cat([head[part][row][None] for head in heads for row in range(head_dim) for part in range(3)])
    return qkv
