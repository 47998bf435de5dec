"""Perplexity of a domain, the average over domains, bits per byte, and how sure each figure is. Pure arithmetic.

perplexity = exp(nats of the whole domain / tokens of the reference tokenizer). The probability of a text does not
depend on how it is cut into tokens, so models with different tokenizers compare: each is divided by the same number.
Source: the normalised loss of Skywork's README ("领域数据困惑度评估"), which HammerLLM's README follows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES, SEED = 1000, 1234
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentLosses:
    """Of the d documents of a domain under one model.

    nats [d]: negative log-probability of the whole document; not finite where the model gave no number.
    num_bytes, num_reference_tokens [d]: of the scored text, in UTF-8 and by the reference tokenizer.
    """

    nats: np.ndarray
    num_bytes: np.ndarray
    num_reference_tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval of 95 %; NaN where there is no figure, or no interval: one document has none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DomainEstimates:
    """log_resamples [NUM_RESAMPLES]: logarithms of the perplexity of resampled documents."""

    perplexity: Estimate
    bits_per_byte: Estimate
    log_resamples: np.ndarray


@functools.cache
def estimate_domain(losses: DocumentLosses) -> DomainEstimates:
    """The figures of a domain; all NaN if any document's loss is not finite, so that it cannot hide in a sum."""
    nats = losses.nats if np.isfinite(losses.nats).all() else np.full_like(losses.nats, np.nan)
    num_documents = len(nats)
    # The same documents are drawn for every model, so that models are compared on equal terms.
    generator = np.random.default_rng(SEED)
    chances = np.full(num_documents, 1 / num_documents)
    counts_of = (generator.multinomial(num_documents, chances) for _ in range(NUM_RESAMPLES))
    columns = np.stack([nats, losses.num_bytes, losses.num_reference_tokens], axis=1)
    sums = np.stack([counts @ columns for counts in counts_of])
    total_nats, total_bytes, total_tokens = columns.sum(0)
    # A resample without tokens has no figure, and a loss of thousands of nats per token is an infinite perplexity.
    with np.errstate(all="ignore"):
        log_resamples = sums[:, 0] / sums[:, 2]
        return DomainEstimates(
            _estimate(np.exp(total_nats / total_tokens), np.exp(log_resamples), num_documents),
            _estimate(total_nats / np.log(2) / total_bytes, sums[:, 0] / np.log(2) / sums[:, 1], num_documents),
            log_resamples,
        )


def average_perplexity(perplexities: Sequence[float]) -> float:
    """The geometric mean: the perplexity of the mean loss. NaN is left out; NaN where nothing else is there."""
    known = [value for value in perplexities if not np.isnan(value)]
    return float(np.exp(np.mean(np.log(known)))) if known else float("nan")


def estimate_average(domains: Sequence[DomainEstimates]) -> Estimate:
    """The average over the domains that have a figure, whose documents are resampled independently."""
    known = [domain for domain in domains if not np.isnan(domain.perplexity.value)]
    value = average_perplexity([domain.perplexity.value for domain in known])
    if not known or any(np.isnan(domain.perplexity.low) for domain in known):
        return Estimate(value, np.nan, np.nan)
    # Each domain drew from the same random numbers; reordered, they are independent of one another.
    generator = np.random.default_rng(SEED)
    logs = np.mean([generator.permutation(domain.log_resamples) for domain in known], axis=0)
    return _estimate(value, np.exp(logs), 2)


def _estimate(value: float, resamples: np.ndarray, num_documents: int) -> Estimate:
    if num_documents < 2 or not np.isfinite(value):
        return Estimate(float(value), np.nan, np.nan)
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
