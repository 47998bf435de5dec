"""Statistics computed in pieces equal those of the whole tensor."""

import math

import pytest
import torch

from megatron_hammer.checkpoint.inspection import tensor_statistics
from megatron_hammer.checkpoint.inspection.tensor_statistics import measure_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_elements", [3, 7, 1 << 20])
def test_pieces_give_the_statistics_of_the_whole(dtype, chunk_elements, monkeypatch):
    monkeypatch.setattr(tensor_statistics, "_CHUNK_ELEMENTS", chunk_elements)
    tensor = (5 + torch.randn(11, 13, generator=torch.Generator().manual_seed(1))).to(dtype)
    tensor[0, :2] = 0
    found, whole = measure_tensor(tensor), tensor.double()
    assert (found.min, found.max) == (whole.min().item(), whole.max().item())
    assert found.mean == pytest.approx(whole.mean().item(), rel=1e-12)
    assert found.std == pytest.approx(whole.std(correction=0).item(), rel=1e-12)
    assert (found.num_elements, found.num_nan, found.num_infinite, found.num_zero) == (143, 0, 0, 2)


def test_nan_and_infinity_are_counted_and_excluded():
    tensor = torch.tensor([1.0, float("nan"), 3.0, float("inf"), float("-inf"), float("nan")])
    found = measure_tensor(tensor)
    assert (found.num_nan, found.num_infinite) == (2, 2)
    assert (found.min, found.max, found.mean, found.std) == (1.0, 3.0, 2.0, 1.0)


def test_an_empty_tensor_has_no_range():
    for tensor in (torch.empty(0), torch.tensor([float("nan")])):
        found = measure_tensor(tensor)
        assert all(math.isnan(value) for value in (found.min, found.max, found.mean, found.std))
