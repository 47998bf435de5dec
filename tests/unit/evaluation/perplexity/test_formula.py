"""Figures of a domain and their intervals."""

import math

import numpy as np
import pytest

from megatron_hammer.evaluation.perplexity.formula import (
    DocumentLosses,
    average_perplexity,
    estimate_average,
    estimate_domain,
)


def make_losses(nats: list[float], num_bytes: list[int], num_tokens: list[int]) -> DocumentLosses:
    return DocumentLosses(nats=np.array(nats), num_bytes=np.array(num_bytes), num_reference_tokens=np.array(num_tokens))


def test_the_loss_of_a_domain_is_a_sum_over_its_documents() -> None:
    found = estimate_domain(make_losses([30.0, 6.0], [40, 20], [10, 2]))
    assert found.perplexity.value == pytest.approx(math.exp(36 / 12))  # not the mean of exp(3) and exp(3)
    assert found.bits_per_byte.value == pytest.approx(36 / math.log(2) / 60)
    other = estimate_domain(make_losses([30.0, 6.0], [40, 20], [20, 4]))
    assert other.perplexity.value == pytest.approx(math.exp(36 / 24))
    assert other.bits_per_byte == found.bits_per_byte


def test_one_document_without_a_number_leaves_no_figure() -> None:
    for bad in (math.nan, math.inf):
        found = estimate_domain(make_losses([30.0, bad, 5.0], [40, 20, 9], [10, 2, 3]))
        assert math.isnan(found.perplexity.value)
        assert math.isnan(found.bits_per_byte.value)
    good = estimate_domain(make_losses([30.0, 5.0], [40, 9], [10, 3]))
    assert estimate_average([found, good]).value == pytest.approx(good.perplexity.value)
    assert math.isnan(estimate_average([found]).value)
    assert math.isnan(average_perplexity([math.nan]))


@pytest.mark.filterwarnings("error")
def test_an_infinite_perplexity_is_averaged_and_a_document_without_tokens_leaves_no_interval() -> None:
    huge = estimate_domain(make_losses([9e5, 8e5], [40, 9], [10, 3]))
    assert huge.perplexity.value == math.inf
    assert estimate_average([huge, estimate_domain(make_losses([30.0, 5.0], [40, 9], [10, 3]))]).value == math.inf
    # Of one character behind nothing: the resample that draws it twice has no tokens.
    found = estimate_domain(make_losses([30.0, 0.0], [40, 1], [10, 0]))
    assert found.perplexity.value == pytest.approx(math.exp(3))
    assert math.isnan(found.perplexity.low)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    num_covered, num_trials = 0, 60
    for _ in range(num_trials):
        lengths = generator.integers(50, 150, 40)
        # 2 bits a byte in expectation, varying from document to document.
        nats = lengths * math.log(2) * generator.normal(2, 0.3, 40)
        found = estimate_domain(make_losses(list(nats), list(lengths), list(lengths))).bits_per_byte
        assert found.low < found.value < found.high
        num_covered += found.low <= 2 <= found.high
    assert 0.85 < num_covered / num_trials <= 1


def test_one_document_has_no_interval() -> None:
    found = estimate_domain(make_losses([30.0], [40], [10]))
    assert math.isnan(found.perplexity.low)
    assert math.isnan(estimate_average([found, found]).high)


def test_the_average_of_two_equal_domains_has_a_narrower_interval() -> None:
    generator = np.random.default_rng(1)
    tokens = [10] * 30
    domain = estimate_domain(make_losses(list(generator.normal(30, 6, 30)), tokens, tokens))
    average = estimate_average([domain, domain])
    assert average.value == pytest.approx(domain.perplexity.value)
    width = domain.perplexity.high - domain.perplexity.low
    # 1 / sqrt(2) for independent domains, 1 if both drew the same documents.
    assert average.high - average.low == pytest.approx(width / math.sqrt(2), rel=0.15)
