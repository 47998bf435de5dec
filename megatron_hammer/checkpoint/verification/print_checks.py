"""The table of what was checked, as every tool that verifies prints it."""

from collections.abc import Iterable

from rich.console import Console

from megatron_hammer.checkpoint.verification.verdicts import CheckRow
from megatron_hammer.files.tables import build_table, open_console

VERDICTS = {True: "passed", False: "FAILED", None: "not done"}


def print_checks(rows: Iterable[CheckRow], console: Console | None = None, *, title: str | None = None) -> None:
    """Print one line a check; one that could not be done says why. console: standard output where none is given."""
    cells = ((row.check, row.result, VERDICTS[row.is_passed]) for row in rows)
    table = build_table(title, ("check", "result", ""), cells, num_text=3)
    (console or open_console()).print(table, "")
