"""The table of what was checked, as every tool that verifies prints it."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_hammer.checkpoint.verification.verdicts import CheckRow

VERDICTS = {True: "passed", False: "FAILED", None: "not done"}
FILE_WIDTH = 300  # of a table that goes to a file or a pipe, so that no row is broken


def print_checks(rows: Iterable[CheckRow], console: Console | None = None, *, title: str | None = None) -> None:
    """Print one line a check; one that could not be done says why. console: standard output where none is given."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("check", overflow="fold")
    table.add_column("result", overflow="fold")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(row.check, row.result, VERDICTS[row.is_passed])
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=FILE_WIDTH)
    console.print(table)
