"""Differences of two forward passes are what their names say, and NaN passes nothing."""

import dataclasses
import json
import math

import pytest
import torch

from megatron_hammer.checkpoint.verification.logit_comparison import (
    compare_logits,
    measure_difference,
    merge_texts,
    read_text_difference,
)


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))


def test_a_difference_is_measured_at_every_position():
    reference = random_logits(1)
    changed = reference.clone()
    changed[2, 5] += 0.5
    changed[6, 0] -= 2.0
    found = measure_difference(changed, reference)
    assert found.max == pytest.approx(2.0)
    assert [round(value, 5) for value in found.position_max] == [0, 0, 0.5, 0, 0, 0, 2.0]
    assert found.root_mean_square == pytest.approx(math.sqrt((0.25 + 4) / 77))
    assert (found.count_within(0.5001), found.count_within(0.4)) == (6, 5)


def test_losses_are_torchs_cross_entropy():
    logits, reference, tokens = random_logits(1), random_logits(2), torch.arange(7)
    found = compare_logits(logits, reference, tokens)
    for side, total in ((logits, found.loss_sum), (reference, found.reference_loss_sum)):
        expected = torch.nn.functional.cross_entropy(side[:-1], tokens[1:], reduction="sum")
        assert total == pytest.approx(expected.item(), rel=1e-6)
    assert found.num_targets == 6


def test_a_changed_choice_has_the_margin_that_the_reference_gave():
    reference = torch.zeros(3, 4)
    reference[:, 1] = 1.0
    reference[1, 2] = 0.75
    logits = reference.clone()
    logits[1, 2] = 1.5
    found = compare_logits(logits, reference, torch.tensor([0, 1, 2]))
    assert (found.num_same_choice, found.changed_margin) == (2, 0.25)


def test_texts_are_merged_and_survive_json():
    texts = [compare_logits(random_logits(i), random_logits(i + 9), torch.arange(7)) for i in range(3)]
    merged = merge_texts(texts)
    assert merged.num_tokens == 21
    assert merged.logits.max == max(one.logits.max for one in texts)
    assert merged.log_probabilities.num_elements == 3 * 77
    assert read_text_difference(json.loads(json.dumps(dataclasses.asdict(merged)))) == merged
    with pytest.raises(ValueError, match="no text was compared"):
        merge_texts([])


def test_nan_is_no_small_difference():
    logits = random_logits(1)
    logits[3, 3] = float("nan")
    found = merge_texts([compare_logits(random_logits(1), random_logits(1), torch.arange(7))] * 2)
    assert found.logits.max == 0
    broken = compare_logits(logits, random_logits(1), torch.arange(7))
    assert math.isnan(merge_texts([broken, found]).logits.max)
    assert math.isnan(broken.logits.root_mean_square)
    assert broken.logits.count_within(1e9) == 6


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the tensor has shape \(7, 11\), the reference \(7, 10\)"):
        measure_difference(random_logits(1), random_logits(1)[:, :10])
