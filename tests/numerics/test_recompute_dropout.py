"""Recomputation on a CPU repeats the dropout of the forward pass, although one generator serves both devices."""

import pytest
import torch

from tests.helpers.toy_model import LLAMA
from tests.helpers.whole_model import build_whole_model, read_arguments, single_rank

DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with single_rank():
        yield


def compute_gradients(*flags: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses [b, s] and all gradients of one batch, from the same weights and the same random states."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(5)
    model = build_whole_model(read_arguments(LLAMA, flags)).train()
    model_parallel_cuda_manual_seed(6)
    tokens = torch.randint(LLAMA.vocab_size, (2, 38), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(37).expand(2, -1)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    losses.sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_changes_nothing(recompute: tuple[str, ...]) -> None:
    losses, gradients = compute_gradients(*DROPOUT)
    recomputed_losses, recomputed_gradients = compute_gradients(*DROPOUT, *recompute)
    assert torch.equal(recomputed_losses, losses)
    assert are_equal(recomputed_gradients, gradients)


def test_there_is_dropout_to_repeat() -> None:
    assert not torch.equal(
        compute_gradients(*DROPOUT)[0], compute_gradients(*DROPOUT[:2], "--attention-dropout", "0")[0]
    )
    assert not torch.equal(compute_gradients(*DROPOUT)[0], compute_gradients("--hidden-dropout", "0", *DROPOUT[2:])[0])


def test_a_twin_that_does_not_restore_the_random_states_differs(monkeypatch) -> None:
    from megatron.core.tensor_parallel import random

    losses, gradients = compute_gradients(*DROPOUT)
    monkeypatch.setattr(random, "_set_all_rng_states", lambda *states: None)
    recomputed_losses, recomputed_gradients = compute_gradients(*DROPOUT, *FULL)
    assert torch.equal(recomputed_losses, losses)  # the forward pass does not need them
    assert not are_equal(recomputed_gradients, gradients)
