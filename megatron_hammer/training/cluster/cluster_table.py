"""The measured links as a table of clusters.toml, which scaling studies read with --clusters-file."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_hammer.errors import ConfigError, OutputError
from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.typed import read_toml
from megatron_hammer.scaling.cost.coefficients import Coefficients, format_toml_value
from megatron_hammer.scaling.cost.communication import Group, build_link
from megatron_hammer.scaling.plan import Cluster
from megatron_hammer.training.cluster.traffic import LinkFit

# The collectives whose bandwidth stands for that of the links: an all-reduce may use the switch's arithmetic.
RING_COLLECTIVES = ("all-gather", "reduce-scatter")


def check_cluster_path(path: Path, name: str) -> None:
    """Raises OutputError if the file holds tables that writing it would lose."""
    if not path.exists():
        return
    try:
        tables = read_toml(path, dict[str, dict[str, Any]], remedy="Choose another file.", raises=ConfigError)
    except ConfigError as error:
        raise OutputError(*error.problems) from error
    others = [table for table in tables if table != name]
    if others:
        raise OutputError(
            f"{path}: file must hold no other table than [{name}], got [{'], ['.join(others)}]. Choose another file."
        )


def build_cluster(
    name: str,
    source: str,
    base: Cluster,
    coefficients: Coefficients,
    *,
    ranks_per_host: int,
    num_hosts: int,
    fits: Mapping[tuple[str, str], LinkFit],
) -> Cluster:
    """`base` with the measured links. fits: by kind of group ("host", "network") and collective.

    The cost model multiplies a bandwidth by a fitted ratio and adds the start of a collective. Both are taken out here,
    so that a projection with these coefficients has the times that were measured.
    """
    measured, values = [], dict[str, Any]()
    links = {
        "host": (
            "links inside a host",
            "nvlink",
            Group(ranks_per_host, ranks_per_host, 1),
            coefficients.nvlink_ratio,
        ),
        "network": ("the network", "network", Group(num_hosts, 1, ranks_per_host), coefficients.network_ratio),
    }
    for kind, (text, prefix, group, ratio) in links.items():
        fit = _average([fits[kind, collective] for collective in RING_COLLECTIVES if (kind, collective) in fits])
        # Hosts in one NVLink domain (NVL72) reach one another without the network.
        if fit is None or (kind == "network" and base.nvlink_domain_size > base.gpus_per_node):
            continue
        measured.append(text)
        wires_s = max(0.0, fit.latency_s - coefficients.collective_s)
        values |= {
            f"{prefix}_bytes_per_s": fit.bytes_per_s / ratio,
            f"{prefix}_latency_s": wires_s / _count_steps(prefix, group, base, coefficients),
        }
    # A domain of several hosts is not seen from one of them.
    if base.nvlink_domain_size <= base.gpus_per_node:
        values["nvlink_domain_size"] = ranks_per_host
    note = f"{source}; measured: {', '.join(measured) or 'nothing'}; the rest as {base.name}"
    return replace(base, name=name, source=note, gpus_per_node=ranks_per_host, **values)


def _count_steps(prefix: str, group: Group, base: Cluster, coefficients: Coefficients) -> float:
    """How many latencies of a wire the cost model adds up for this group."""
    latencies: dict[str, Any] = {"nvlink_latency_s": 0.0, "network_latency_s": 0.0, f"{prefix}_latency_s": 1.0}
    unit = replace(base, **latencies)
    return build_link(group, unit, coefficients).ring_s - coefficients.collective_s


def write_cluster(path: Path, cluster: Cluster) -> None:
    """Write the file with this one table, complete, so that it describes the cluster without the shipped file."""
    lines = [f"[{cluster.name}]"]
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        if field.name != "name" and value is not None:
            lines.append(f"{field.name} = {format_toml_value(value)}")
    publish_files({path: "\n".join(lines) + "\n"})


def _average(fits: list[LinkFit]) -> LinkFit | None:
    if not fits:
        return None
    return LinkFit(sum(fit.latency_s for fit in fits) / len(fits), sum(fit.bytes_per_s for fit in fits) / len(fits))
