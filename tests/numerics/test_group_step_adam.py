"""Our Adam against torch's fused one, bit for bit, and its state in the layout that megatron expects."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.platforms.group_step_adam import GroupStepAdam

NUM_STEPS = 20
SHAPES = [(7,), (3, 5), (2, 3, 11), (1,), (129, 65)]
BETAS, EPS = (0.9, 0.95), 1e-6
Optimizer = torch.optim.Optimizer


def make_groups() -> list[dict[str, Any]]:
    """Two groups that differ in everything, one without parameters; the last parameter of each never has a gradient."""
    generator = torch.Generator().manual_seed(1234)

    def make(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    return [
        {"params": make(*SHAPES[:3], (4,)), "lr": 1e-2, "weight_decay": 0.1},
        {"params": [], "lr": 3e-3, "weight_decay": 0.2},
        {"params": make(*SHAPES[3:], (6,)), "lr": 3e-3, "weight_decay": 0.0},
    ]


def build(groups: list[dict[str, Any]], **options: Any) -> GroupStepAdam:
    return GroupStepAdam(groups, betas=BETAS, eps=EPS, **options)


def list_params(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizers: list[Optimizer], steps: range, *, lr_of: Callable[[int], float] = lambda step: 1.0) -> None:
    """The same gradients for all, of widely different sizes, and a learning rate that moves."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for params in zip(*map(list_params, optimizers), strict=True):
            gradient = torch.randn(params[0].shape, generator=generator) * 10.0 ** (step % 5 - 3)
            for param in params:
                param.grad = None if param.shape in ((4,), (6,)) else gradient.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("max_lr", group["lr"]) * lr_of(step)
            optimizer.step()


def assert_equal(ours: Optimizer, reference: Optimizer) -> None:
    for param, expected in zip(list_params(ours), list_params(reference), strict=True):
        assert torch.equal(param, expected)
        assert set(ours.state[param]) - {"step"} == set(reference.state[expected]) - {"step"}
        for name in set(ours.state[param]) - {"step"}:
            assert torch.equal(ours.state[param][name], reference.state[expected][name])


@pytest.mark.parametrize(
    ("adam_w_mode", "torch_class"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["adamw", "adam"]
)
def test_equals_torch_bit_for_bit(adam_w_mode: bool, torch_class: type) -> None:
    groups = make_groups()
    reference = torch_class(copy.deepcopy(groups), betas=BETAS, eps=EPS, fused=True)
    start = [param.detach().clone() for param in list_params(reference)]
    ours = build(groups, adam_w_mode=adam_w_mode)
    train([ours, reference], range(NUM_STEPS), lr_of=lambda step: 1.0 - step / 40)
    assert_equal(ours, reference)
    moved = [not torch.equal(old, param) for old, param in zip(start, list_params(ours), strict=True)]
    assert moved == [True, True, True, False, True, True, False]


@pytest.mark.parametrize("broken", ["step", "mode", "weight_decay"])
def test_a_twin_with_one_thing_broken_differs(broken: str) -> None:
    groups = make_groups()
    reference = torch.optim.AdamW(copy.deepcopy(groups), betas=BETAS, eps=EPS, fused=True)
    ours = build(groups, adam_w_mode=broken != "mode")
    for group in ours.param_groups:
        if broken == "step":
            group["step"] = 1
        if broken == "weight_decay":
            group["weight_decay"] += 1e-3
    train([ours, reference], range(NUM_STEPS))
    with pytest.raises(AssertionError):
        assert_equal(ours, reference)


def test_state_layout() -> None:
    optimizer = build(make_groups())
    train([optimizer], range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3]  # the empty group too
    params = list_params(optimizer)
    assert [bool(optimizer.state[param]) for param in params] == [True, True, True, False, True, True, False]
    for param in params:
        if optimizer.state[param]:
            assert list(optimizer.state[param]) == ["exp_avg", "exp_avg_sq"]
            for moment in optimizer.state[param].values():
                assert moment.dtype == torch.float32
                assert moment.shape == param.shape


def test_a_saved_state_continues_bit_for_bit() -> None:
    whole, first = build(make_groups()), build(make_groups())
    train([whole], range(NUM_STEPS))
    train([first], range(7))
    saved = copy.deepcopy(first.state_dict())
    second = build(make_groups())
    for param, value in zip(list_params(second), list_params(first), strict=True):
        param.data.copy_(value.data)
    second.load_state_dict(saved)
    train([second], range(7, NUM_STEPS))
    assert_equal(second, whole)
    assert [group["step"] for group in second.param_groups] == [NUM_STEPS] * 3


def test_unsupported_options_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be captured in a CUDA graph; install TransformerEngine"):
        build(make_groups(), capturable=True)
    with pytest.raises(ValueError, match="takes no closure"):
        build(make_groups()).step(lambda: 0.0)


class _Operators(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_copies_nothing_from_the_host() -> None:
    """lift_fresh is torch.tensor, whose copy to a GPU waits for everything that is queued there."""
    optimizer = build(make_groups())
    with _Operators() as operators:
        torch.tensor(1.0)
    assert "lift_fresh" in operators.names
    with _Operators() as operators:
        train([optimizer], range(1))
    assert "_fused_adamw_" in operators.names
    assert operators.names.isdisjoint({"lift_fresh", "_to_copy"})
