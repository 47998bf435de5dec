"""Weight gradients, norm and scaling of many tensors against fp64 and megatron's own loops.

The product of 16-bit matrices onto an fp32 one exists only on GPUs. Here a CPU kernel is given to the very operator
that is called, `aten::addmm.dtype_out`, so that overload and arguments are torch's.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.platforms import gradient_arithmetic
from megatron_hammer.platforms.gradient_arithmetic import norm_of_all, scale_all
from tests.helpers.matrix_products import add_product
from tests.helpers.whole_model import single_rank

TOKENS, BATCH, INPUTS, OUTPUTS = 37, 3, 24, 40


def test_norm_does_not_depend_on_how_tensors_are_cut() -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(1 << 20, generator=generator) * torch.rand(1 << 20, generator=generator).pow(4)
    expected = whole.double().norm().item()
    for pieces in ([whole], list(whole.chunk(2)), list(whole.chunk(7))):
        norm, per_tensor = norm_of_all(65536, None, [pieces], False)
        assert per_tensor is None
        assert (norm.shape, norm.dtype) == ((1,), torch.float32)
        assert abs(norm.item() - expected) <= 1e-7 * expected
    # Why it exists: what it replaces, or the adjustment can go.
    assert abs(torch.norm(whole).item() - expected) > 1e-5 * expected


def test_norm_of_many_tensors_of_any_shape() -> None:
    tensors = [torch.ones(3, 4), torch.zeros(0), torch.full((5,), -2.0), torch.ones(1, dtype=torch.bfloat16)]
    norm, _ = norm_of_all(65536, None, [tensors], False)
    assert norm.item() == pytest.approx((12 + 20 + 1) ** 0.5, rel=1e-7)
    assert norm_of_all(65536, None, [[torch.tensor([torch.inf])]], False)[0].item() == torch.inf


@pytest.mark.parametrize("scale", [0.37, torch.tensor([0.37])], ids=["number", "tensor"])
def test_scaling_is_megatrons(scale: Any) -> None:
    from megatron.core.utils import local_multi_tensor_scale

    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(size, generator=generator) for size in (5, 7)]
    expected = [gradient.clone() for gradient in gradients]
    local_multi_tensor_scale(65536, None, [expected, expected], scale)
    addresses = [gradient.data_ptr() for gradient in gradients]
    scale_all(65536, None, [gradients, gradients], scale)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert [gradient.data_ptr() for gradient in gradients] == addresses
    # Between fp32 and fp16 weights, and with a factor.
    halves = [torch.empty_like(gradient, dtype=torch.float16) for gradient in gradients]
    scale_all(65536, None, [gradients, halves], 1.0)
    assert all(torch.equal(half, gradient.half()) for half, gradient in zip(halves, gradients, strict=True))
    doubled = [torch.empty_like(gradient) for gradient in gradients]
    scale_all(65536, None, [gradients, doubled], 2.0)
    assert all(torch.equal(double, 2 * gradient) for double, gradient in zip(doubled, gradients, strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor([0.5])], ids=["copy", "number", "tensor"])
def test_a_rank_without_gradients_is_scaled_too(scale: Any) -> None:
    scale_all(65536, None, [[], []], scale)


@pytest.fixture
def multiplies_onto_fp32() -> Iterator[list[torch.dtype]]:
    """Give the CPU that operator; the dtypes of the factors that it was called with."""
    called: list[torch.dtype] = []

    def addmm(self: Tensor, one: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(one.dtype)
        return add_product(self, one, *args, **kwargs)

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield called
    library._destroy()


@pytest.fixture(scope="module")
def _rank() -> Iterator[None]:
    with single_rank():
        yield


def train_linear(dtype: torch.dtype, main_dtype: torch.dtype, *, is_fused: bool) -> tuple[Tensor, Tensor]:
    """(main_grad of megatron's linear layer after two micro-batches, the same in fp64)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    generator = torch.Generator().manual_seed(5)
    weight: Any = torch.nn.Parameter(torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype))
    weight.main_grad = torch.zeros(OUTPUTS, INPUTS, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    exact = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for _ in range(2):
        inputs = torch.randn(TOKENS, BATCH, INPUTS, generator=generator).to(dtype).requires_grad_()
        gradient = torch.randn(TOKENS, BATCH, OUTPUTS, generator=generator).to(dtype)
        output = layers.linear_with_grad_accumulation_and_async_allreduce(
            inputs, weight, None, is_fused, False, False, tp_group=parallel_state.get_tensor_model_parallel_group()
        )
        output.backward(gradient)
        if not is_fused:  # what megatron's DistributedDataParallel does in its hook
            weight.main_grad.add_(weight.grad)
        assert weight.grad_added_to_main_grad is is_fused
        weight.grad = None
        exact += torch.einsum("sbo,sbi->oi", gradient.double(), inputs.detach().double())
        assert torch.equal(inputs.grad, gradient @ weight)  # type: ignore[arg-type]
    return weight.main_grad.double(), exact


@pytest.mark.usefixtures("_rank")
@pytest.mark.parametrize(
    "dtype, main_dtype, tolerance",
    [
        (torch.bfloat16, torch.float32, 1e-4),
        (torch.float32, torch.float32, 1e-4),  # measured 2e-5, of sums up to 40
        (torch.bfloat16, torch.bfloat16, 0.3),  # two roundings
    ],
)
def test_weight_gradients_go_into_main_grad(
    monkeypatch: pytest.MonkeyPatch,
    multiplies_onto_fp32: list[torch.dtype],
    dtype: torch.dtype,
    main_dtype: torch.dtype,
    tolerance: float,
) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", gradient_arithmetic, raising=False)
    fused, exact = train_linear(dtype, main_dtype, is_fused=True)
    assert (fused - exact).abs().max() <= tolerance
    assert multiplies_onto_fp32 == ([dtype] * 2 if dtype != main_dtype else [])
    if dtype == torch.bfloat16:  # twin: a gradient that is rounded before it is added is further off
        unfused, exact = train_linear(dtype, main_dtype, is_fused=False)
        assert (unfused - exact).abs().max() > (fused - exact).abs().max()
