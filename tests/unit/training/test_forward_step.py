"""The loss is a sum over the tokens that count, with their number beside it; megatron divides."""

import torch

from megatron_hammer.training.forward_step import sum_loss


def test_masked_tokens_do_not_count() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    loss, num_tokens, report = sum_loss(mask, losses)
    assert loss.item() == 21.0
    assert num_tokens.item() == 3
    assert num_tokens.dtype == torch.int32
    assert list(report) == ["lm loss"]
    assert report["lm loss"].tolist() == [21.0, 3.0]
    assert not report["lm loss"].requires_grad
    loss.backward()
    assert torch.equal(losses.grad, mask)


def test_the_sum_is_in_fp32() -> None:
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)  # bf16 would stop at 256
    loss, num_tokens, report = sum_loss(torch.ones(1, 4096), losses)
    assert loss.dtype == report["lm loss"].dtype == torch.float32
    assert loss.item() == num_tokens.item() == 4096


def test_a_batch_without_a_token_that_counts_is_zero() -> None:
    loss, num_tokens, report = sum_loss(torch.zeros(2, 3), torch.ones(2, 3))
    assert loss.item() == num_tokens.item() == 0
    assert report["lm loss"].tolist() == [0.0, 0.0]
