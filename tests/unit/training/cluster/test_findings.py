"""Outliers by median and MAD, and values that must be equal on all hosts."""

import pytest

from megatron_hammer.training.cluster.findings import compare_values, find_outliers

EVEN = {"a": 100.0, "b": 101.0, "c": 99.0, "d": 100.5, "e": 99.5}


def test_equal_hosts_have_no_outlier() -> None:
    assert find_outliers(EVEN, is_low_bad=True) == []
    assert find_outliers(EVEN, is_low_bad=False) == []
    assert find_outliers({"a": 5.0}, is_low_bad=True) == []


def test_the_slow_host_is_found_and_the_fast_one_left_alone() -> None:
    values = EVEN | {"slow": 60.0, "slower": 50.0, "fast": 200.0}
    assert find_outliers(values, is_low_bad=True) == ["slower", "slow"]
    assert find_outliers(values, is_low_bad=False) == ["fast"]


def test_values_without_spread_still_allow_noise() -> None:
    """The MAD of equal values is 0, so by it alone every difference would be an outlier."""
    values = dict.fromkeys("abcd", 100.0)
    assert find_outliers(values | {"e": 85.0}, is_low_bad=True) == []
    assert find_outliers(values | {"e": 75.0}, is_low_bad=True) == ["e"]


def test_scattered_values_hide_what_lies_within_their_scatter() -> None:
    values = {"a": 60.0, "b": 80.0, "c": 100.0, "d": 120.0, "e": 140.0}
    assert find_outliers(values, is_low_bad=True) == []


def test_of_two_values_one_must_be_much_worse() -> None:
    assert find_outliers({"a": 100.0, "b": 60.0}, is_low_bad=True) == []
    assert find_outliers({"a": 100.0, "b": 40.0}, is_low_bad=True) == ["b"]
    assert find_outliers({"a": 100.0, "b": 40.0}, is_low_bad=False) == ["a"]


def test_latencies_may_differ_more() -> None:
    values = dict.fromkeys("abcd", 100.0)
    assert find_outliers(values | {"e": 250.0}, is_low_bad=False, is_latency=True) == []
    assert find_outliers(values | {"e": 350.0}, is_low_bad=False, is_latency=True) == ["e"]
    assert find_outliers({"a": 100.0, "b": 400.0}, is_low_bad=False, is_latency=True) == []


def test_a_value_of_one_host_is_named_with_the_host() -> None:
    finding = compare_values("torch", {"a": "2.15", "b": "2.15", "c": "2.14"}, remedy="Install it.")
    assert (finding.status, finding.host) == ("problem", "c")
    assert "2.15 on 2 hosts, but 2.14 on c" in finding.text


def test_without_a_majority_every_host_is_named() -> None:
    finding = compare_values("torch", {"a": "2.15", "b": None}, remedy="Install it.")
    assert (finding.status, finding.host) == ("problem", "a, b")
    assert "2.15 on a; not set on b" in finding.text


@pytest.mark.parametrize("value", ["2.15", None])
def test_equal_values_are_fine(value: str | None) -> None:
    assert compare_values("torch", dict.fromkeys("abc", value), remedy="").status == "fine"
