"""The alpha-beta fit, and the messages of a layout."""

import pytest

from megatron_hammer.training.cluster.traffic import Traffic, count_sent_bytes, fit_link

SIZES = (1e3, 1.6e4, 2.6e5, 4.2e6, 6.7e7)


def test_the_fit_returns_latency_and_bandwidth() -> None:
    fit = fit_link({size: 20e-6 + size / 50e9 for size in SIZES})
    assert fit.latency_s == pytest.approx(20e-6, rel=1e-9)
    assert fit.bytes_per_s == pytest.approx(50e9, rel=1e-9)


def test_one_disturbed_size_moves_the_fit_little() -> None:
    times_s = {size: 20e-6 + size / 50e9 for size in SIZES}
    times_s[SIZES[1]] *= 10  # as if another job had run meanwhile
    fit = fit_link(times_s)
    assert fit.latency_s == pytest.approx(20e-6, rel=0.1)
    assert fit.bytes_per_s == pytest.approx(50e9, rel=0.1)


def test_times_without_a_slope_give_a_lower_bound_of_the_bandwidth() -> None:
    fit = fit_link({1e3: 1e-4, 1e4: 0.9e-4})
    assert fit.bytes_per_s == pytest.approx(1e4 / 0.9e-4)
    assert fit.latency_s >= 0


def test_one_size_is_no_fit() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit_link({1e3: 1e-4})


def test_sent_bytes_are_those_of_a_ring() -> None:
    assert count_sent_bytes("all-gather", 800, 8) == 700
    assert count_sent_bytes("all-reduce", 800, 8) == 1400
    assert count_sent_bytes("send", 800, 8) == 800


@pytest.mark.parametrize("num_bytes", [1, 1 << 12, 1 << 30])
def test_every_traffic_has_sizes_to_fit(num_bytes: int) -> None:
    sizes = Traffic(kind="tensor", collectives=("all-reduce",), num_bytes=num_bytes).sizes
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) >= 1 + (num_bytes >= 1 << 12)
