"""Prints the table of checks, for every tool that verifies."""

from collections.abc import Iterable

from rich.console import Console

from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.files.tables import build_table, open_console

VERDICTS = {True: "passed", False: "FAILED", None: "not done"}


def print_checks(rows: Iterable[CheckRow], console: Console | None = None, *, title: str | None = None) -> None:
    """Print one line per check; one that was not done says why. console: standard output by default."""
    cells = ((row.check, row.result, VERDICTS[row.is_passed]) for row in rows)
    table = build_table(title, ("check", "result", ""), cells, num_text=3)
    (console or open_console()).print(table, "")
