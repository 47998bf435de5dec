"""From what the ranks measured to findings: each function judges one check. Pure; OUTLIER_RULE is in findings.py.

hosts: the host of each rank. Values are by rank, in JSON's types, as they came through the store.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hammer.training.cluster.findings import (
    Finding,
    Measurement,
    compare_values,
    describe_spread,
    find_outliers,
    list_names,
)
from megatron_hammer.training.cluster.traffic import LinkFit, count_sent_bytes, fit_link

LEAST_PEAK_SHARE = 0.4  # of the data sheet's peak; large products reach 0.6 to 0.8 of it on a GPU that is not throttled
HOT_C = 90
VERSION_REMEDY = "Install the same on every host."
VARIABLE_REMEDY = "Set it for all processes, or for none."
DATA_REMEDY = "Copy the files again."


def judge_health(health: Mapping[int, dict[str, Any] | None], hosts: Sequence[str]) -> list[Finding]:
    """GPU errors, slowdowns and links. health: a GpuHealth as a dictionary; None where NVML could not be asked."""
    findings = []
    for rank, values in health.items():
        place: dict[str, Any] = {"check": "GPU health", "host": hosts[rank], "rank": rank}
        if values is None:
            text = "NVML does not know this GPU (no driver library, or a MIG slice)"
            findings.append(Finding(status="unknown", text=text, **place))
            continue
        problems = _list_health_problems(values)
        unknown = [name for name, value in values.items() if value is None]
        if problems:
            findings.append(Finding(status="problem", text="; ".join(problems), **place))
        if unknown:
            findings.append(Finding(status="unknown", text=f"no answer about {', '.join(unknown)}", **place))
    return findings or [Finding(check="GPU health", status="fine", text=f"{len(health)} GPUs answered every question")]


def _list_health_problems(values: Mapping[str, Any]) -> list[str]:
    found = []
    if values["ecc_errors"]:
        found.append(f"{values['ecc_errors']} uncorrected memory errors since the driver was loaded")
    if values["has_failed_row"]:
        found.append("a memory row must be replaced: reset the GPU, or have the board exchanged")
    if values["slowdowns"]:
        found.append(f"its clock is lowered now because of {', '.join(values['slowdowns'])}")
    if values["temperature_c"] is not None and values["temperature_c"] >= HOT_C:
        found.append(f"{values['temperature_c']} degrees C (from {HOT_C} on it slows down)")
    if values["xids"]:
        found.append(f"the driver reported Xid {', '.join(values['xids'])} since the machine started")
    if values["inactive_links"]:
        found.append(f"{values['inactive_links']} NVLinks are down")
    width, most = values["pcie_width"], values["most_pcie_width"]
    if width and most and width < most:
        found.append(f"PCI Express has {width} lanes of {most}")
    return found


def judge_speed(
    check: str,
    values: Mapping[int, float],
    hosts: Sequence[str],
    unit: str,
    *,
    is_low_bad: bool = True,
    peak: float | None = None,
) -> tuple[list[Finding], list[Measurement]]:
    """Whether any rank is slower than the others, or far below the data sheet's peak (in the same unit)."""
    slow = find_outliers(values, is_low_bad=is_low_bad)
    if peak is not None:
        slow += [rank for rank, value in values.items() if value < LEAST_PEAK_SHARE * peak and rank not in slow]
    spread = describe_spread(list(values.values()), unit)
    findings = [
        Finding(
            check=check,
            status="problem",
            text=f"{values[rank]:.4g} {unit}, and of all ranks {spread}"
            + ("" if peak is None else f"; the data sheet has {peak:.4g}"),
            host=hosts[rank],
            rank=rank,
        )
        for rank in slow
    ]
    measurements = [
        Measurement(check=check, where=f"rank {rank} ({hosts[rank]})", value=value, unit=unit)
        for rank, value in values.items()
    ]
    return findings or [Finding(check=check, status="fine", text=spread)], measurements


def judge_memory(values: Mapping[int, dict[str, int]], hosts: Sequence[str]) -> list[Finding]:
    """values: wrong_words, tested_bytes, free_bytes, total_bytes of each rank's device."""
    findings = [
        Finding(
            check="memory",
            status="problem",
            text=f"{value['wrong_words']} of {value['tested_bytes'] // 8} words changed after they were written. "
            "Take this host out.",
            host=hosts[rank],
            rank=rank,
        )
        for rank, value in values.items()
        if value["wrong_words"]
    ]
    free = {rank: value["free_bytes"] / 1e9 for rank, value in values.items()}
    for rank in find_outliers(free, is_low_bad=True):
        text = f"{free[rank]:.4g} GB are free, and of all ranks {describe_spread(list(free.values()), 'GB')}. "
        text += "Another process may hold the rest."
        findings.append(Finding(check="memory", status="problem", text=text, host=hosts[rank], rank=rank))
    tested = min(value["tested_bytes"] for value in values.values()) / 1e9
    text = f"{tested:.4g} GB of each rank kept what was written; free: {describe_spread(list(free.values()), 'GB')}"
    return findings or [Finding(check="memory", status="fine", text=text)]


def judge_groups(
    kind: str, collective: str, times: Mapping[tuple[int, ...], Mapping[int, float]], hosts: Sequence[str]
) -> tuple[list[Finding], list[Measurement], LinkFit]:
    """Latency and bandwidth of all groups of a kind. times: seconds by message size, for the ranks of each group.

    The fit that is returned is that of a typical group: the medians.
    """
    check = f"{kind} groups, {collective}"
    fits = {
        ranks: fit_link({count_sent_bytes(collective, size, len(ranks)): time_s for size, time_s in by_size.items()})
        for ranks, by_size in times.items()
    }
    bandwidths = {ranks: fit.bytes_per_s / 1e9 for ranks, fit in fits.items()}
    latencies = {ranks: fit.latency_s * 1e6 for ranks, fit in fits.items()}
    findings = []
    for values, unit, is_low_bad in ((bandwidths, "GB/s", True), (latencies, "us", False)):
        spread = describe_spread(list(values.values()), unit)
        for ranks in find_outliers(values, is_low_bad=is_low_bad, is_latency=not is_low_bad):
            names = list_names([hosts[rank] for rank in ranks])
            text = f"ranks {list_names(list(map(str, ranks)))}: {values[ranks]:.4g} {unit}, and of all groups {spread}"
            findings.append(Finding(check=check, status="problem", text=text, host=names))
    measurements = [
        Measurement(check=check, where=f"ranks {list_names(list(map(str, ranks)))}", value=value, unit=unit)
        for values, unit in ((bandwidths, "GB/s"), (latencies, "us"))
        for ranks, value in values.items()
    ]
    text = f"{len(fits)} of {len(next(iter(fits)))} ranks each: {describe_spread(list(bandwidths.values()), 'GB/s')}, "
    text += describe_spread(list(latencies.values()), "us")
    typical = LinkFit(statistics.median(latencies.values()) / 1e6, statistics.median(bandwidths.values()) * 1e9)
    return findings or [Finding(check=check, status="fine", text=text)], measurements, typical


def judge_pairs(
    check: str, bytes_per_s: Mapping[tuple[int, int], float], hosts: Sequence[str]
) -> tuple[list[Finding], list[Measurement]]:
    """The slow links among pairs of ranks; a host that is slow in most of its pairs is named once, as the cause."""
    values = {pair: value / 1e9 for pair, value in bytes_per_s.items()}
    slow = find_outliers(values, is_low_bad=True)
    spread = describe_spread(list(values.values()), "GB/s")
    num_pairs, num_slow = ({rank: sum(rank in pair for pair in pairs) for pair in values for rank in pair}
                           for pairs in (values, slow))  # fmt: skip
    # Of a slow pair, both ends have a slow link; an end at which more than half is slow is the cause.
    causes = [rank for rank in num_pairs if num_pairs[rank] > 1 and 2 * num_slow[rank] > num_pairs[rank]]
    findings = [
        Finding(
            check=check,
            status="problem",
            text=f"{num_slow[rank]} of its {num_pairs[rank]} links are slow; of all links {spread}",
            host=hosts[rank],
            rank=rank,
        )
        for rank in causes
    ]
    for left, right in slow:
        if left not in causes and right not in causes:
            text = f"ranks {left} and {right}: {values[left, right]:.4g} GB/s, and of all links {spread}"
            findings.append(
                Finding(check=check, status="problem", text=text, host=list_names([hosts[left], hosts[right]]))
            )
    measurements = [
        Measurement(check=check, where=f"ranks {left} and {right} ({hosts[left]}, {hosts[right]})", value=value,
                    unit="GB/s")
        for (left, right), value in values.items()
    ]  # fmt: skip
    return findings or [Finding(check=check, status="fine", text=f"{len(values)} pairs: {spread}")], measurements


def judge_clocks(skews: Mapping[str, tuple[float, float]], most_s: float) -> list[Finding]:
    """skews: (seconds ahead of rank 0's host, error bound) of each other host."""
    if not skews:
        return [Finding(check="clocks", status="not applicable", text="there is one host")]
    findings = [
        Finding(
            check="clocks",
            status="problem",
            text=f"{skew_s:+.3f} s against the host of rank 0 (known to {error_s:.3f} s), allowed are {most_s:g} s. "
            "Start NTP or chrony there.",
            host=host,
        )
        for host, (skew_s, error_s) in skews.items()
        # What the error bound may explain is no problem of the clock.
        if abs(skew_s) - error_s > most_s
    ]
    worst_s, worst_error_s = max(skews.values(), key=lambda skew: abs(skew[0]))
    text = f"at most {abs(worst_s):.3f} s apart, known to {worst_error_s:.3f} s"
    unsure = [host for host, (_, error_s) in skews.items() if error_s > most_s]
    if unsure and not findings:
        text = f"the round trip is too long to tell ({text}; allowed are {most_s:g} s)"
        return [Finding(check="clocks", status="unknown", text=text, host=list_names(unsure))]
    return findings or [Finding(check="clocks", status="fine", text=text)]


def judge_visibility(check: str, seconds: Mapping[int, float | None], hosts: Sequence[str], within_s: float) -> Finding:
    """Whether every rank saw what rank 0 wrote."""
    blind = [rank for rank, value in seconds.items() if value is None]
    if blind:
        names = list_names([hosts[rank] for rank in blind])
        text = f"ranks {list_names(list(map(str, blind)))} did not see in {within_s:.0f} s what rank 0 wrote. "
        return Finding(check=check, status="problem", text=text + "Give a folder that all hosts share.", host=names)
    longest_s = max(value for value in seconds.values() if value is not None)
    return Finding(check=check, status="fine", text=f"all {len(seconds)} ranks saw it within {longest_s:.2f} s")


def judge_renames(
    problems: Mapping[int, Sequence[str]], seen: Mapping[int, float | None], hosts: Sequence[str]
) -> list[Finding]:
    """What the readers saw while a file was replaced. problems, seen: see watch_versions."""
    check = "rename in the shared folder"
    by_text: dict[str, list[int]] = {}
    for rank, texts in problems.items():
        for text in texts:
            by_text.setdefault(text, []).append(rank)
    findings = [
        Finding(check=check, status="problem", text=text, host=list_names([hosts[rank] for rank in ranks]))
        for text, ranks in by_text.items()
    ]
    late = [rank for rank, moment in seen.items() if moment is None]
    if late:
        text = "the last version was not seen"
        findings.append(
            Finding(check=check, status="problem", text=text, host=list_names([hosts[rank] for rank in late]))
        )
    text = f"{len(seen)} readers saw whole versions only, in order"
    return findings or [Finding(check=check, status="fine", text=text)]


def judge_equality(
    versions: Mapping[int, Mapping[str, str | None]],
    variables: Mapping[int, Mapping[str, str]],
    data: Mapping[int, Mapping[str, str]],
    hosts: Sequence[str],
) -> list[Finding]:
    """Whether all ranks have the same versions, environment variables and data files."""
    findings = []
    for title, values, remedy in (
        ("versions", versions, VERSION_REMEDY),
        ("environment", variables, VARIABLE_REMEDY),
        ("data files", data, DATA_REMEDY),
    ):
        names = dict.fromkeys(name for of_rank in values.values() for name in of_rank)
        compared = [
            compare_values(f"{title}: {name}", _join_by_host(name, values, hosts), remedy=remedy) for name in names
        ]
        different = [finding for finding in compared if finding.status == "problem"]
        different += [
            Finding(check=finding.check, status="problem", text=finding.text)
            for finding in compared
            if finding.status == "fine" and finding.text.startswith("not readable")
        ]
        if not names:
            text = "the run names none" if values is data else "none is set"
            findings.append(Finding(check=title, status="not applicable", text=text))
        findings += different
        if names and not different:
            findings.append(Finding(check=title, status="fine", text=_summarise(title, compared)))
    return findings


def _summarise(title: str, compared: Sequence[Finding]) -> str:
    if title == "data files":
        return f"{len(compared)} equal everywhere"
    known = [finding for finding in compared if finding.text != "not set"]
    return ", ".join(f"{finding.check.removeprefix(f'{title}: ')} {finding.text}" for finding in known)


def _join_by_host(name: str, values: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]) -> dict[str, Any]:
    """The value of each host; where its own ranks differ, all of theirs."""
    of_host: dict[str, dict[Any, None]] = {}
    for rank, of_rank in values.items():
        of_host.setdefault(hosts[rank], {})[of_rank.get(name)] = None
    return {
        host: next(iter(found)) if len(found) == 1 else " and ".join(map(str, found)) for host, found in of_host.items()
    }


def slowest_of_groups(
    groups: Sequence[tuple[int, ...]], times: Mapping[int, Mapping[int, float]]
) -> dict[tuple[int, ...], dict[int, float]]:
    """Seconds by message size of each group whose ranks all answered: those of its slowest rank."""
    return {
        ranks: {size: max(times[rank][size] for rank in ranks) for size in times[ranks[0]]}
        for ranks in groups
        if all(rank in times for rank in ranks)
    }
