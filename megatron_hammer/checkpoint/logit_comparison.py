"""How far two forward passes are apart: logits, log-probabilities, the chosen token and the loss, text by text.

Pure functions on tensors. A difference counts as NaN if either side has one, and NaN passes no tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitDifference:
    """One text, or several put together by `merge_differences`; differences are the largest absolute ones.

    changed_margin: where the two choose different tokens, by how much the reference preferred its own, at most.
    loss_sum, reference_loss_sum: of the cross entropies of `num_targets` next tokens, in nats.
    """

    num_tokens: int
    max_logit: float
    max_log_probability: float
    num_same_choice: int
    changed_margin: float
    num_targets: int
    loss_sum: float
    reference_loss_sum: float


def compare_logits(logits: Tensor, reference: Tensor, tokens: Tensor) -> LogitDifference:
    """logits, reference: [s, v] of tokens [s]; raises ValueError if they differ in shape."""
    if logits.shape != reference.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, the reference {tuple(reference.shape)}")
    logits, reference = logits.float(), reference.float()
    log_probabilities, expected = logits.log_softmax(-1), reference.log_softmax(-1)
    choice, expected_choice = logits.argmax(-1), reference.argmax(-1)
    preference = reference.gather(-1, expected_choice[:, None]) - reference.gather(-1, choice[:, None])
    targets = tokens[1:, None]
    return LogitDifference(
        num_tokens=len(tokens),
        max_logit=max_difference(logits, reference),
        max_log_probability=max_difference(log_probabilities, expected),
        num_same_choice=int((choice == expected_choice).sum()),
        changed_margin=preference.max().item(),
        num_targets=len(targets),
        loss_sum=-log_probabilities[:-1].gather(-1, targets).double().sum().item(),
        reference_loss_sum=-expected[:-1].gather(-1, targets).double().sum().item(),
    )


def merge_differences(differences: Sequence[LogitDifference]) -> LogitDifference:
    """Several texts as one; raises ValueError if there are none."""
    if not differences:
        raise ValueError("no text was compared")
    return LogitDifference(
        num_tokens=sum(one.num_tokens for one in differences),
        max_logit=largest([one.max_logit for one in differences]),
        max_log_probability=largest([one.max_log_probability for one in differences]),
        num_same_choice=sum(one.num_same_choice for one in differences),
        changed_margin=largest([one.changed_margin for one in differences]),
        num_targets=sum(one.num_targets for one in differences),
        loss_sum=sum(one.loss_sum for one in differences),
        reference_loss_sum=sum(one.reference_loss_sum for one in differences),
    )


def max_difference(tensor: Tensor, other: Tensor) -> float:
    """The largest absolute difference, NaN if any element is."""
    return (tensor.float() - other.float()).abs().max().item()  # torch's max keeps NaN


def largest(values: Sequence[float]) -> float:
    """Python's max, but NaN if any value is."""
    return torch.tensor(values, dtype=torch.float64).max().item()
