"""Judges what the two sides computed: one row per check, with its limit and the reason for that limit.

In fp32 the largest difference is judged. In bf16, or if a tie between experts sends a token to another expert, single
positions can differ much although every weight is right. There the root mean square, or most positions, are judged.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hammer.checkpoint.verification.forward_exchange import ForwardRequest
from megatron_hammer.checkpoint.verification.logit_comparison import (
    TensorDifference,
    read_difference,
    read_text_difference,
)

# Of the standard deviation of what is compared. fp32: the same sums in two orders; measured 1.4e-6 to 3.5e-6 on toys
# of 3 layers and 1.2e-5 on hammer-1b4, all of random weights.
FP32_LIMIT_RATIO = 1e-4
# bf16: every operation rounds to 8 bits; root mean square measured 0.009 to 0.016 on dense toys of 3 layers, 0.03 on
# 24 layers, and 0.08 on experts, whose ties are many in bf16 (there the next limit lets it pass).
BF16_LIMIT_RATIO = 5e-2
# A deep or badly conditioned model amplifies rounding: then this many times the difference between transformers' own
# two attention kernels on one text; the largest of several texts was measured up to 10 times that of one.
FP32_NOISE_FACTOR, BF16_NOISE_FACTOR = 20.0, 10.0
# A tie changes only the positions after it in its text; a wrong expert changes nearly all positions.
CLEAN_SHARE_AFTER_TIES = 0.5
LEAST_SHARE_OF_SAME_CHOICE = 0.8  # in bf16, and after ties


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One line of the table: the check, its result, and whether it passed. None: not done, and `result` says why."""

    check: str
    result: str
    is_passed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What a difference is held against. loose: of the root mean square, where ties between experts are found."""

    value: float
    loose: float
    is_root_mean_square: bool
    has_experts: bool
    cause: str

    def judge(self, found: TensorDifference) -> tuple[bool, str]:
        """(whether it is within the limit, both as a text)."""
        # In bf16 the largest of many differences depends on chance; their root mean square does not.
        if self.is_root_mean_square:
            text = f"root mean square difference {found.root_mean_square:.2e}, limit {self.value:.2e} ({self.cause})"
            return found.root_mean_square <= self.value, text
        text = f"max |difference| {found.max:.2e}, limit {self.value:.2e} ({self.cause})"
        # NaN is within no limit, because every comparison with it is false.
        if found.max <= self.value or not self.has_experts:
            return found.max <= self.value, text
        num_within, num_positions = found.count_within(self.value), len(found.position_max)
        is_tie = num_within >= CLEAN_SHARE_AFTER_TIES * num_positions and found.root_mean_square <= self.loose
        return is_tie, f"{text}; {num_within} of {num_positions} positions within it" + (
            ", the others after a tie between experts" if is_tie else ""
        )


def build_limit(request: ForwardRequest, std: float, noise: dict[str, Any]) -> Limit:
    """std: of the reference. noise: how far transformers' own two attention kernels are apart."""
    own = read_difference(noise)
    is_fp32 = request.dtype == "float32"
    if is_fp32:
        ratio, factor, amount = FP32_LIMIT_RATIO, FP32_NOISE_FACTOR, own.max
    else:
        ratio, factor, amount = BF16_LIMIT_RATIO, BF16_NOISE_FACTOR, own.root_mean_square
    plain, noisy = ratio * std, factor * amount
    cause = f"{ratio:g} of the standard deviation, {std:.3g}"
    if noisy > plain:
        cause = f"{factor:g} times what transformers' eager and sdpa attention differ by"
    return Limit(
        value=max(plain, noisy),
        loose=BF16_LIMIT_RATIO * std,
        is_root_mean_square=not is_fp32,
        has_experts=request.has_experts,
        cause=cause,
    )


def judge_logits(request: ForwardRequest, theirs: dict[str, Any], ours: dict[str, Any]) -> list[CheckRow]:
    """The rows of the whole model."""
    found = read_text_difference(ours)
    source = "texts" if theirs["has_tokenizer"] else "sequences of random ids (the folder has no tokenizer that loads)"
    on = f"{theirs['class']} in {request.dtype} on {theirs['num_texts']} {source}, {found.num_tokens} tokens"
    # Written so that NaN fails too. Logits without spread would make every limit zero.
    if not theirs["std"] > 0:
        return [CheckRow(f"logits, {on}", f"standard deviation {theirs['std']:.3g}: nothing to compare", False)]
    limit = build_limit(request, theirs["std"], theirs["noise"])
    is_within, text = limit.judge(found.logits)
    # A log-probability has the difference of its logit and that of the sum over all of them.
    doubled = dataclasses.replace(limit, value=2 * limit.value, loose=2 * limit.loose, cause="twice that")
    has_probabilities, probabilities_text = doubled.judge(found.log_probabilities)
    loss, expected_loss = found.loss_sum / found.num_targets, found.reference_loss_sum / found.num_targets
    # Where single positions may differ (bf16, ties), the mean loss is held to the loose limit as well.
    loss_limit = limit.loose if limit.is_root_mean_square or found.logits.max > limit.value else limit.value
    return [
        CheckRow(f"logits, {on}", text, is_within),
        CheckRow("log-probabilities", probabilities_text, has_probabilities),
        _judge_choice(found, limit),
        CheckRow(
            "mean loss",
            f"Megatron {loss:.6f}, transformers {expected_loss:.6f}, limit {loss_limit:.2e}",
            abs(loss - expected_loss) <= loss_limit,
        ),
    ]


def _judge_choice(found: Any, limit: Limit) -> CheckRow:
    """Where two tokens are nearly equally probable, either may win."""
    share = found.num_same_choice / found.num_tokens
    text = f"equal at {found.num_same_choice} of {found.num_tokens} positions"
    if found.num_same_choice < found.num_tokens:
        text += f", elsewhere {found.changed_margin:.2e} apart at most"
    # Twice the limit: one of the two logits may rise by it and the other fall by it.
    is_close = found.changed_margin <= 2 * limit.value
    is_loose = limit.is_root_mean_square or (limit.has_experts and found.logits.max > limit.value)
    return CheckRow("most probable token", text, is_close or (is_loose and share >= LEAST_SHARE_OF_SAME_CHOICE))


def judge_layers(request: ForwardRequest, theirs: dict[str, Any], ours: dict[str, Any]) -> list[CheckRow]:
    """The rows of the sampled layers; each text is of the layer that is furthest from what is expected."""
    layers = ours["layers"]
    numbers = ", ".join(str(layer["layer"]) for layer in layers)
    outputs = [
        build_limit(request, layer["output_std"], noise).judge(read_difference(layer["output"]))
        for layer, noise in zip(layers, theirs["noise"], strict=True)
    ]
    logits = [
        build_limit(request, layer["logits_std"], noise).judge(read_difference(layer["logits"]))
        for layer, noise in zip(layers, theirs["logits_noise"], strict=True)
    ]
    embedding = max(layer["embedding"] for layer in layers)
    how = f"{theirs['class']} in {request.dtype} on {request.num_tokens} hidden states each"
    return [
        CheckRow(f"decoder layers {numbers}, {how}", *_worst(outputs)),
        CheckRow(f"final norm and {len(request.rows)} rows of the head after them", *_worst(logits)),
        CheckRow(
            f"{len(request.rows)} rows of the embedding",
            "equal" if embedding == 0 else f"max |difference| {embedding:.2e}",
            # No arithmetic is done on these rows, so no rounding can excuse a difference.
            embedding == 0,
        ),
    ]


def _worst(judged: Sequence[tuple[bool, str]]) -> tuple[str, bool]:
    """The text of the first that failed, or of the first."""
    failed = [text for is_passed, text in judged if not is_passed]
    return (failed or [text for _, text in judged])[0], not failed
