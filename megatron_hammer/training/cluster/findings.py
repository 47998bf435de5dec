"""What a check of a cluster found, as plain data, and the rules by which equal machines are compared. Pure.

A check that could not be made is `unknown` and says why; one that the machine has no use for is `not applicable`.
Neither counts as passed.
"""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["fine", "problem", "unknown", "not applicable"]

# A normal distribution has 1.4826 median absolute deviations in one standard deviation.
DEVIATIONS = 5 * 1.4826
# Below this share of the median a difference is the noise of a measurement, however close together the others are.
# A latency depends on what else a host does.
LEAST_DIFFERENCE, LEAST_LATENCY_DIFFERENCE = 0.2, 2.0
# Of two values no median can say which is wrong; one is suspected where it is this much worse.
PAIR_RATIO, LATENCY_PAIR_RATIO = 2.0, 5.0
OUTLIER_RULE = (
    f"an outlier is worse than the median by more than {DEVIATIONS / 1.4826:.0f} standard deviations (estimated by the "
    f"median absolute deviation) and by more than {LEAST_DIFFERENCE:.0%}, of latencies {LEAST_LATENCY_DIFFERENCE:.0%}; "
    f"of two values it is {PAIR_RATIO:.0f} times worse, of latencies {LATENCY_PAIR_RATIO:.0f} times"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One result of one check. host, rank: whom it is about, where it is about one of them."""

    check: str
    status: Status
    text: str
    host: str | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One measured quantity, and where. unit: such as GB/s."""

    check: str
    where: str
    value: float
    unit: str


def find_outliers[K: Hashable](values: Mapping[K, float], *, is_low_bad: bool, is_latency: bool = False) -> list[K]:
    """The keys whose value is worse than the others' by OUTLIER_RULE, the worst first; none of a single value."""
    least = LEAST_LATENCY_DIFFERENCE if is_latency else LEAST_DIFFERENCE
    sign = 1.0 if is_low_bad else -1.0
    by_goodness = sorted(values, key=lambda key: sign * values[key])
    if len(values) < 2:
        return []
    if len(values) == 2:
        worse, better = (values[key] for key in by_goodness)
        small, large = sorted((worse, better))
        return by_goodness[:1] if large > (LATENCY_PAIR_RATIO if is_latency else PAIR_RATIO) * small else []
    median = statistics.median(values.values())
    spread = statistics.median(abs(value - median) for value in values.values())
    allowed = max(DEVIATIONS * spread, least * abs(median))
    return [key for key in by_goodness if sign * (median - values[key]) > allowed]


def describe_spread(values: Sequence[float], unit: str) -> str:
    """'median 12.3 GB/s (11.9 to 12.5)'."""
    return f"median {statistics.median(values):.4g} {unit} ({min(values):.4g} to {max(values):.4g})"


def compare_values(check: str, values: Mapping[str, Any], *, remedy: str, of: str = "hosts") -> Finding:
    """Whether a thing has the same value on every host; where not, which hosts have another one than most.

    values: by host. None stands for "not there". of: what `values` are by, for the sentence.
    """
    hosts_of: dict[str, list[str]] = {}
    for host, value in values.items():
        hosts_of.setdefault("not set" if value is None else str(value), []).append(host)
    if len(hosts_of) == 1:
        return Finding(check=check, status="fine", text=next(iter(hosts_of)))
    # The value of most hosts first; sorted is stable, so of equal counts the one that was seen first.
    groups = sorted(hosts_of.items(), key=lambda item: -len(item[1]))
    has_majority = len(groups[0][1]) > len(groups[1][1])
    shown = groups[1:] if has_majority else groups
    others = "; ".join(f"{value} on {list_names(hosts)}" for value, hosts in shown)
    rule = f"{groups[0][0]} on {len(groups[0][1])} {of}, but " if has_majority else ""
    return Finding(
        check=check,
        status="problem",
        text=f"must be equal everywhere, got {rule}{others}. {remedy}",
        host=", ".join(host for _, hosts in (groups[1:] if has_majority else groups) for host in hosts),
    )


def list_names(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:most]) + (f" and {len(unique) - most} more" if len(unique) > most else "")
