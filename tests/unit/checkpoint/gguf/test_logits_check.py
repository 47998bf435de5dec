"""Greedy steps are compared token by token; near ties pass within the type's tolerance, real differences do not."""

import pytest
import torch

from megatron_hammer.checkpoint.gguf.llama_cpp import GreedyStep
from megatron_hammer.checkpoint.gguf.logits_check import Continuation, compare_steps, find_obstacle, judge

LOGITS = torch.tensor([[0.0, 2.0, -1.0, 1.0], [3.0, -3.0, 0.5, 2.999]])


def steps_of(logits: torch.Tensor, *tokens: int) -> tuple[Continuation]:
    """What llama.cpp would say of these logits, had it chosen `tokens`."""
    rows = logits.log_softmax(-1)
    steps = tuple(
        GreedyStep(token=token, log_probabilities={other: row[other].item() for other in (0, 3)})
        for token, row in zip(tokens, rows, strict=True)
    )
    return (Continuation(prompt=(5, 6), steps=steps),)


def test_the_same_choices_pass():
    comparison = compare_steps([LOGITS], steps_of(LOGITS, 1, 0))
    assert (comparison.num_steps, comparison.num_equal, comparison.largest_margin) == (2, 2, 0.0)
    assert comparison.largest_difference < 1e-6
    sentence, is_passed = judge(comparison, "f32")
    assert sentence.startswith("2 of 2 greedy tokens equal; log-probabilities within ")
    assert is_passed


def test_a_near_tie_passes_only_where_the_type_rounds():
    comparison = compare_steps([LOGITS], steps_of(LOGITS, 1, 3))
    assert comparison.num_equal == 1
    assert comparison.largest_margin == pytest.approx(0.001, abs=1e-5)
    assert judge(comparison, "f16")[1]
    moved = compare_steps([LOGITS], steps_of(LOGITS + torch.tensor([0.0, 0.0, 0.0, 0.01]), 1, 3))
    assert judge(moved, "f16")[1]
    sentence, is_passed = judge(moved, "f32")
    assert not is_passed
    assert sentence.endswith("; where they differ, transformers' margin is at most 0.001 nats")


def test_twin_another_model_does_not_pass():
    comparison = compare_steps([LOGITS], steps_of(LOGITS.flip(-1), 2, 0))
    assert judge(comparison, "f16")[1] is False
    assert judge(comparison, "bf16")[1] is False
    assert judge(comparison, "q4_k_m")[1] is None


def test_no_steps_prove_nothing():
    comparison = compare_steps([LOGITS[:0], LOGITS], (Continuation(prompt=(1,), steps=()), *steps_of(LOGITS, 1, 0)))
    assert comparison.num_steps == 2


def test_a_model_larger_than_memory_is_not_compared():
    assert find_obstacle(1_000) is None
    assert find_obstacle(10**13).startswith("transformers needs 40001.1 GB of memory for the model in f32, ")
