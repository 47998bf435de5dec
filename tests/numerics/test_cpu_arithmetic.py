"""The CPU's replacements of Megatron's functions against autograd and the collective that they skip."""

from typing import Any

import pytest
import torch

from megatron_hammer.platforms.cpu_arithmetic import skip_gather_of_one_rank, swiglu_back
from megatron_hammer.platforms.megatron_compat import ADJUSTMENTS

OURS = ("no-compiler-import", "silu-kernels", "no-gather-of-one-rank")


def swiglu_by_autograd(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    leaf = gate_up.detach().clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_swiglu_back_is_the_gradient(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    grad, gate_up = (torch.randn(5, 3, width, generator=generator, dtype=torch.float64) for width in (7, 14))
    expected = swiglu_by_autograd(grad, gate_up)
    result = swiglu_back(grad.to(dtype), gate_up.to(dtype))
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    swapped = torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)
    assert (swiglu_back(grad.to(dtype), swapped.to(dtype)) - expected).abs().max() > 0.1


def test_gather_of_one_rank_is_skipped_only_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    gather = skip_gather_of_one_rank(lambda *tensors, **options: calls.append(options))
    buffer = torch.arange(6.0)
    world_size = {"value": 1}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: world_size["value"])
    gather(buffer, buffer[:6], group="dp", async_op=True)
    assert calls == []
    gather(buffer, torch.zeros(6), group="dp", async_op=False)
    world_size["value"] = 2
    gather(buffer, buffer[:3], group="dp", async_op=True)
    assert calls == [{"group": "dp", "async_op": False}, {"group": "dp", "async_op": True}]


@pytest.mark.parametrize("name", OURS)
def test_upstream_still_needs_it(name: str) -> None:
    (adjustment,) = (adjustment for adjustment in ADJUSTMENTS if adjustment.name == name)
    assert adjustment.platforms == ("cpu",)
    assert adjustment.is_needed()
