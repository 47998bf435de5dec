"""Published failure counts, and the rate that is made of them."""

import numpy as np
import pytest

from megatron_hammer.scaling.decisions.failures import (
    FailureCount,
    FailureRate,
    estimate_failure_rate,
    load_failure_counts,
)


def test_published_counts_give_the_published_times() -> None:
    counts = load_failure_counts()
    # Llama 3: one interruption in about 3.1 h. RSC-1: the paper projects 1.8 h on 16,384 and 0.23 h on 131,072 GPUs.
    assert 24 / (16_384 * counts["llama3-405b"].per_gpu_day) == pytest.approx(54 * 24 / 419)
    assert 24 / (16_384 * counts["meta-rsc-1"].per_gpu_day) == pytest.approx(1.8, abs=0.01)
    assert 24 / (131_072 * counts["meta-rsc-1"].per_gpu_day) == pytest.approx(0.23, abs=0.01)
    assert all("arXiv" in count.source for count in counts.values())


def test_a_cluster_is_predicted_from_the_others() -> None:
    """Each left out in turn: the 80 % band of the other ones holds four of five. OPT failed more often than that."""
    counts = load_failure_counts()
    inside = []
    for name, count in counts.items():
        rate = estimate_failure_rate({other: counts[other] for other in counts if other != name})
        low, high = np.percentile(rate.draw(np.random.default_rng(0), 20_000), [10, 90])
        if low < count.per_gpu_day < high:
            inside.append(name)
    assert inside == ["llama3-405b", "bloom-176b", "meta-rsc-1", "meta-rsc-2"]


def build_counts(*per_day: float) -> dict[str, FailureCount]:
    return {
        f"cluster-{i}": FailureCount(num_gpus=10, days=1.0, failures=10 * rate, counted="x", source="y")
        for i, rate in enumerate(per_day)
    }


def test_clusters_count_once_each_however_long_they_were_watched() -> None:
    rate = estimate_failure_rate(build_counts(0.001, 0.004, 0.016))
    assert rate.per_gpu_day == pytest.approx(0.004)
    assert rate.log_deviation == pytest.approx(np.log(4))
    drawn = rate.draw(np.random.default_rng(1), 50_000)
    assert np.median(drawn) == pytest.approx(0.004, rel=0.05)
    # Two degrees of freedom: the 90th percentile of Student's t is 1.886.
    assert np.percentile(drawn, 90) == pytest.approx(0.004 * 4 ** (1.886 * np.sqrt(4 / 3)), rel=0.1)


def test_a_known_rate_has_no_spread() -> None:
    assert set(FailureRate(per_gpu_day=0.002).draw(np.random.default_rng(0), 5)) == {0.002}
