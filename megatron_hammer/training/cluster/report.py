"""The report of a check: one JSON object, or tables for people."""

import dataclasses
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from megatron_hammer.files.tables import build_pairs, build_table, open_console
from megatron_hammer.training.cluster.findings import OUTLIER_RULE, Finding, Measurement

ORDER = ("problem", "unknown", "not applicable", "fine")


@dataclass(kw_only=True)
class Report:
    """What is known so far; rank 0 fills it in, and prints it even if a later stage never ends."""

    date: str
    command: str
    platform: str
    layout: str
    hosts: list[str] = field(default_factory=list)  # by rank
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "problem"]

    def to_json(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "command": self.command,
            "platform": self.platform,
            "layout": self.layout,
            "hosts": self.hosts,
            "outlier_rule": OUTLIER_RULE,
            "num_problems": len(self.problems),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "measurements": [dataclasses.asdict(measurement) for measurement in self.measurements],
        }


def print_report(report: Report, stream: IO[str], *, as_json: bool) -> None:
    """Print problems first; people see a line for each check, machines every measurement too."""
    if as_json:
        stream.write(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2).decode() + "\n")
        stream.flush()
        return
    console = open_console(stream)
    num_hosts = len(set(report.hosts))
    console.print(
        build_pairs(
            "Cluster check",
            {
                "date": report.date,
                "ranks": f"{len(report.hosts)} on {num_hosts} host{'s'[: num_hosts != 1]}, platform {report.platform}",
                "layout": report.layout,
            },
        )
    )
    by_importance = sorted(report.findings, key=lambda finding: ORDER.index(finding.status))
    rows = [(finding.status, finding.check, _name_place(finding), finding.text) for finding in by_importance]
    console.print(build_table(None, ("", "check", "where", "what"), rows, num_text=4))
    console.print(f"rule: {OUTLIER_RULE}")
    counts = {status: sum(finding.status == status for finding in report.findings) for status in ORDER}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


def _name_place(finding: Finding) -> str:
    parts = [finding.host or "", "" if finding.rank is None else f"rank {finding.rank}"]
    return ", ".join(filter(None, parts))
