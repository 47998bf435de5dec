"""The quick answers are torch's slow ones, wherever a single element makes the difference."""

import pytest
import torch

from megatron_hammer.checkpoint import bitwise
from megatron_hammer.checkpoint.bitwise import is_bit_equal, is_finite

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 17, 36, 42])
def test_one_value_that_is_not_finite_is_found(monkeypatch, dtype, value, position):
    monkeypatch.setattr(bitwise, "_CHUNK_ELEMENTS", 10)
    tensor = torch.randn(43).to(dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    tensor[position] = value
    assert not is_finite(tensor)
    assert not torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_are_finite(dtype):
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([[limits.max, limits.min], [limits.smallest_normal, -0.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.int8])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 3), (4, 2, 8)])
def test_equal_bits(dtype, shape):
    tensor = (torch.rand(shape) * 3).to(dtype)
    assert is_bit_equal(tensor, tensor.clone())
    if tensor.numel():
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[-1] ^= 1
        assert not is_bit_equal(tensor, changed)


def test_another_shape_another_dtype_and_another_zero_differ():
    zeros = torch.zeros(2, 3)
    assert not is_bit_equal(zeros, torch.zeros(3, 2))
    assert not is_bit_equal(zeros, zeros.int())
    assert not is_bit_equal(zeros, -zeros)
    assert torch.equal(zeros, -zeros)
    assert is_bit_equal(zeros / 0, zeros / 0)


def test_a_strided_tensor_is_compared_by_its_elements():
    tensor = torch.randn(5, 7)
    assert is_bit_equal(tensor.t(), tensor.t().contiguous())
    assert not is_bit_equal(tensor.t()[1:], tensor.t()[:-1])


def test_data_that_lies_at_an_odd_place_is_compared():
    raw = torch.arange(33, dtype=torch.uint8)
    assert is_bit_equal(raw[1:].view(4, 8), raw[1:].clone().view(4, 8))
    assert not is_bit_equal(raw[1:], raw[:-1])
