"""Bit patterns are judged as torch judges the values: every value of 16 bits, and the limits of 32 bits."""

import pytest
import torch

from megatron_hammer.checkpoint_files.bit_patterns import is_bitwise_equal, is_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits_is_judged_as_torch_does(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    finite = torch.isfinite(values)
    assert is_finite(values[finite])
    assert not any(is_finite(value[None]) for value in values[~finite])
    assert all(is_finite(value[None]) for value in values[finite][::97])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan", "max", "min", "0", "-0.0"])
@pytest.mark.parametrize("position", [0, 300_000, -1])  # in the first, the second and the last block
def test_one_value_among_many_is_found(dtype, value, position):
    tensor = torch.randn(700, 1000, dtype=dtype)
    limits = {"max": torch.finfo(dtype).max, "min": torch.finfo(dtype).min}
    tensor.view(-1)[position] = limits[value] if value in limits else float(value)
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())
    assert is_finite(tensor.t()) == is_finite(tensor)
    assert is_finite(tensor[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("num_elements", [1, 7, 8, 1001])
def test_one_changed_bit_is_found_wherever_it_is(dtype, num_elements):
    tensor = torch.randint(0, 200, (num_elements + 1,)).to(dtype)
    for first in (0, 1):  # the second does not begin at a whole word
        source = tensor[first : first + num_elements]
        copy = source.clone()
        assert is_bitwise_equal(source, copy)
        for position in {0, num_elements // 2, num_elements - 1}:
            changed = copy.clone()
            changed.view(torch.uint8)[position * dtype.itemsize] ^= 1
            assert not is_bitwise_equal(source, changed)


def test_equal_means_the_same_shape_dtype_and_bits():
    zero, not_a_number = torch.zeros(3), torch.full((3,), float("nan"))
    assert not is_bitwise_equal(zero, -zero)
    assert is_bitwise_equal(not_a_number, not_a_number.clone())
    assert not is_bitwise_equal(zero, zero.view(3, 1))
    assert not is_bitwise_equal(zero, zero.double())
    assert is_bitwise_equal(torch.ones(4, 6).t(), torch.ones(6, 4))
