"""How much two forward passes differ: logits, log-probabilities, the chosen token and the loss, text by text.

Pure functions on tensors. A difference is NaN if either side has a NaN, and NaN fails every limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """Of two tensors [s, n]: the largest absolute difference at every position, and the sum of squares of all."""

    position_max: tuple[float, ...]
    square_sum: float
    num_elements: int

    @property
    def max(self) -> float:
        return largest(self.position_max)

    @property
    def root_mean_square(self) -> float:
        return math.sqrt(self.square_sum / self.num_elements)

    def count_within(self, limit: float) -> int:
        """Positions whose largest difference is at most `limit`."""
        return sum(value <= limit for value in self.position_max)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDifference:
    """One text, or several put together by `merge_texts`.

    changed_margin: where the two choose different tokens, by how much the reference preferred its own, at most.
    loss_sum, reference_loss_sum: of the cross entropies of `num_targets` next tokens, in nats.
    """

    logits: TensorDifference
    log_probabilities: TensorDifference
    num_same_choice: int
    changed_margin: float
    num_targets: int
    loss_sum: float
    reference_loss_sum: float

    @property
    def num_tokens(self) -> int:
        return len(self.logits.position_max)


def measure_difference(tensor: Tensor, reference: Tensor) -> TensorDifference:
    """tensor, reference: [s, n]; raises ValueError if they differ in shape."""
    if tensor.shape != reference.shape:
        raise ValueError(f"the tensor has shape {tuple(tensor.shape)}, the reference {tuple(reference.shape)}")
    # fp32: in bf16 the difference itself would be rounded to 8 bits.
    apart = (tensor.float() - reference.float()).abs()
    return TensorDifference(
        position_max=tuple(apart.amax(-1).tolist()),  # torch's maximum keeps NaN
        # fp64: s * v terms, up to millions, are added.
        square_sum=apart.square().sum(dtype=torch.float64).item(),
        num_elements=apart.numel(),
    )


def merge_differences(differences: Sequence[TensorDifference]) -> TensorDifference:
    return TensorDifference(
        position_max=tuple(value for one in differences for value in one.position_max),
        square_sum=math.fsum(one.square_sum for one in differences),
        num_elements=sum(one.num_elements for one in differences),
    )


def compare_logits(logits: Tensor, reference: Tensor, tokens: Tensor) -> TextDifference:
    """logits, reference: [s, v] of tokens [s]; raises ValueError if they differ in shape."""
    difference = measure_difference(logits, reference)
    log_probabilities, expected = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    choice, expected_choice = logits.argmax(-1), reference.argmax(-1)
    # 0 where the choice is the same, so the largest is that of the changed ones.
    preference = reference.gather(-1, expected_choice[:, None]) - reference.gather(-1, choice[:, None])
    targets = tokens[1:, None]
    return TextDifference(
        logits=difference,
        log_probabilities=measure_difference(log_probabilities, expected),
        num_same_choice=int((choice == expected_choice).sum()),
        changed_margin=preference.max().item(),
        num_targets=len(targets),
        # Position i predicts token i + 1, so the last position has no target.
        loss_sum=-log_probabilities[:-1].gather(-1, targets).double().sum().item(),
        reference_loss_sum=-expected[:-1].gather(-1, targets).double().sum().item(),
    )


def merge_texts(texts: Sequence[TextDifference]) -> TextDifference:
    """Several texts as one; raises ValueError if there are none."""
    if not texts:
        raise ValueError("no text was compared")
    return TextDifference(
        logits=merge_differences([one.logits for one in texts]),
        log_probabilities=merge_differences([one.log_probabilities for one in texts]),
        num_same_choice=sum(one.num_same_choice for one in texts),
        changed_margin=largest([one.changed_margin for one in texts]),
        num_targets=sum(one.num_targets for one in texts),
        loss_sum=sum(one.loss_sum for one in texts),
        reference_loss_sum=sum(one.reference_loss_sum for one in texts),
    )


def read_difference(values: dict[str, Any]) -> TensorDifference:
    """The inverse of dataclasses.asdict and JSON."""
    # JSON writes NaN and Infinity as such, and Python's reader accepts them.
    return TensorDifference(**{**values, "position_max": tuple(values["position_max"])})


def read_text_difference(values: dict[str, Any]) -> TextDifference:
    """The inverse of dataclasses.asdict and JSON."""
    nested = {name: read_difference(values[name]) for name in ("logits", "log_probabilities")}
    return TextDifference(**{**values, **nested})


def largest(values: Sequence[float]) -> float:
    """Python's max, but NaN if any value is."""
    # Python's max depends on the order if NaN is among the values: every comparison with it is false.
    return torch.tensor(values, dtype=torch.float64).max().item()
