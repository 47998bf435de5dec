"""From measured values to findings, each with a twin in which something is broken."""

from typing import Any

import pytest

from megatron_hammer.training.cluster import judgements
from megatron_hammer.training.cluster.findings import Finding

HOSTS = [f"host-{rank // 2}" for rank in range(8)]
HEALTHY: dict[str, Any] = {
    "driver": "580.1", "ecc_errors": 0, "has_failed_row": False, "slowdowns": [], "temperature_c": 50, "power_w": 300.0,
    "pcie_width": 16, "most_pcie_width": 16, "inactive_links": 0, "xids": [],
}  # fmt: skip


def list_problems(findings: list[Finding]) -> list[tuple[str | None, int | None]]:
    return [(finding.host, finding.rank) for finding in findings if finding.status == "problem"]


@pytest.mark.parametrize(
    "name, value, phrase",
    [
        ("ecc_errors", 3, "3 uncorrected memory errors"),
        ("has_failed_row", True, "a memory row"),
        ("slowdowns", ["heat (hardware)"], "heat"),
        ("temperature_c", 95, "95 degrees"),
        ("xids", ["79"], "Xid 79"),
        ("inactive_links", 2, "2 NVLinks are down"),
        ("pcie_width", 8, "8 lanes of 16"),
    ],
)
def test_a_sick_gpu_is_named(name: str, value: Any, phrase: str) -> None:
    health = {rank: HEALTHY for rank in range(8)}
    assert list_problems(judgements.judge_health(health, HOSTS)) == []
    (finding,) = judgements.judge_health({**health, 5: HEALTHY | {name: value}}, HOSTS)
    assert (finding.status, finding.host, finding.rank) == ("problem", "host-2", 5)
    assert phrase in finding.text


def test_what_was_not_answered_is_unknown_and_not_fine() -> None:
    (finding,) = judgements.judge_health({0: HEALTHY | {"xids": None}}, HOSTS)
    assert finding.status == "unknown"
    assert "xids" in finding.text
    (finding,) = judgements.judge_health({0: None}, HOSTS)
    assert finding.status == "unknown"


def test_a_slow_rank_is_named() -> None:
    values = {rank: 100.0 + rank for rank in range(8)}
    assert list_problems(judgements.judge_speed("products", values, HOSTS, "TFLOP/s")[0]) == []
    assert list_problems(judgements.judge_speed("products", values | {3: 50.0}, HOSTS, "TFLOP/s")[0]) == [("host-1", 3)]
    # All are equally slow: only the data sheet shows it.
    findings, measurements = judgements.judge_speed("products", values, HOSTS, "TFLOP/s", peak=1000.0)
    assert len(list_problems(findings)) == len(measurements) == 8


def test_memory_that_changed_is_named() -> None:
    value = {"wrong_words": 0, "tested_bytes": 1 << 30, "free_bytes": 80 << 30, "total_bytes": 80 << 30}
    values = {rank: value for rank in range(8)}
    assert list_problems(judgements.judge_memory(values, HOSTS)) == []
    assert list_problems(judgements.judge_memory({**values, 6: value | {"wrong_words": 1}}, HOSTS)) == [("host-3", 6)]
    # Another process holds most of one GPU.
    held = judgements.judge_memory({**values, 2: value | {"free_bytes": 9 << 30}}, HOSTS)
    assert list_problems(held) == [("host-1", 2)]


def make_times(slow: tuple[int, ...] | None, factor: float) -> dict[tuple[int, ...], dict[int, float]]:
    groups = [(0, 1), (2, 3), (4, 5), (6, 7)]
    sizes = (1 << 10, 1 << 14, 1 << 18, 1 << 26)
    return {
        ranks: {size: 20e-6 + size * (factor if ranks == slow else 1.0) / 100e9 for size in sizes} for ranks in groups
    }


def test_a_slow_group_is_named_by_its_hosts() -> None:
    findings, measurements, fit = judgements.judge_groups("tensor", "all-gather", make_times(None, 1.0), HOSTS)
    assert list_problems(findings) == []
    assert len(measurements) == 8
    # Of two ranks each sends half of the message.
    assert fit.bytes_per_s == pytest.approx(50e9, rel=1e-3)
    findings, _, _ = judgements.judge_groups("tensor", "all-gather", make_times((4, 5), 3.0), HOSTS)
    assert list_problems(findings) == [("host-2", None)]


def test_the_slowest_rank_of_a_group_counts() -> None:
    times = {0: {8: 1.0}, 1: {8: 2.0}, 2: {8: 1.0}}
    assert judgements.slowest_of_groups([(0, 1), (2, 3)], times) == {(0, 1): {8: 2.0}}


def test_a_slow_link_is_named_by_its_pair_and_a_slow_host_by_itself() -> None:
    hosts = ["a", "b", "c", "d", "e"]
    even = {(left, right): 10e9 for left in range(5) for right in range(left + 1, 5)}
    assert list_problems(judgements.judge_pairs("links", even, hosts)[0]) == []
    findings, _ = judgements.judge_pairs("links", even | {(1, 3): 2e9}, hosts)
    assert list_problems(findings) == [("b, d", None)]
    slow_host = {pair: 2e9 if 2 in pair else rate for pair, rate in even.items()}
    assert list_problems(judgements.judge_pairs("links", slow_host, hosts)[0]) == [("c", 2)]


def test_a_clock_that_is_off_is_named() -> None:
    assert list_problems(judgements.judge_clocks({"b": (0.02, 0.001), "c": (-0.3, 0.001)}, 1.0)) == []
    assert list_problems(judgements.judge_clocks({"b": (0.02, 0.001), "c": (5.0, 0.001)}, 1.0)) == [("c", None)]
    # A round trip of 20 s cannot tell.
    (finding,) = judgements.judge_clocks({"b": (5.0, 10.0)}, 1.0)
    assert finding.status == "unknown"
    (finding,) = judgements.judge_clocks({}, 1.0)
    assert finding.status == "not applicable"


def test_another_folder_is_named() -> None:
    seen = dict.fromkeys(range(8), 0.1)
    assert judgements.judge_visibility("shared folder", seen, HOSTS, 30.0).status == "fine"
    finding = judgements.judge_visibility("shared folder", seen | {4: None, 5: None}, HOSTS, 30.0)
    assert (finding.status, finding.host) == ("problem", "host-2")


def test_a_broken_rename_is_named() -> None:
    fine = judgements.judge_renames({2: [], 4: []}, {2: 1.0, 4: 1.0}, HOSTS)
    assert [finding.status for finding in fine] == ["fine"]
    broken = judgements.judge_renames({2: ["a part"], 4: []}, {2: 1.0, 4: None}, HOSTS)
    assert list_problems(broken) == [("host-1", None), ("host-2", None)]


def test_other_versions_variables_and_data_are_named() -> None:
    versions = {rank: {"torch": "2.15", "apex": None} for rank in range(8)}
    variables = {rank: {"NCCL_DEBUG": "WARN"} for rank in range(8)}
    data = {rank: {"corpus": "1 token, abc"} for rank in (0, 2, 4, 6)}
    fine = judgements.judge_equality(versions, variables, data, HOSTS)
    assert [finding.status for finding in fine] == ["fine"] * 3
    broken = judgements.judge_equality(
        {**versions, 6: {"torch": "2.14", "apex": None}, 7: {"torch": "2.14", "apex": None}},
        {**variables, 3: {}},
        {**data, 4: {"corpus": "1 token, abd"}},
        HOSTS,
    )
    assert list_problems(broken) == [("host-3", None), ("host-1", None), ("host-2", None)]
    assert [finding.check for finding in broken if finding.status == "problem"] == [
        *("versions: torch", "environment: NCCL_DEBUG", "data files: corpus")
    ]


def test_data_that_nobody_can_read_is_a_problem() -> None:
    findings = judgements.judge_equality({}, {}, {0: {"corpus": "not readable (gone)"}}, HOSTS)
    assert [finding.status for finding in findings] == ["not applicable", "not applicable", "problem"]
