"""Tables of one look, on stdout as wide as the terminal or as a file needs, or in Markdown; and JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 300  # of a file or a pipe, which has no width of its own: no row is broken


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with 1, which in some commands means "different"; exit_on_user_error knows the right code.
        raise


def open_console(stream: IO[str] | None = None) -> Console:
    """Return a console that prints texts as they are: brackets are no markup, and numbers have no colours.

    stream: standard output without it.
    """
    console = _Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def build_table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1
) -> Table:
    """Return a table whose first `num_text` columns are text, to the left, and the others numbers, to the right.

    What is too long for a terminal is folded and never cut.
    """
    table = Table(title=title and Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for position, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if position < num_text else "right", overflow="fold")
    # As Text, because rich looks for markup in strings: [bold] in a file name would disappear.
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def format_markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1) -> str:
    """The same table for a file in Markdown, each line with its line end; bars in cells stay text."""
    rules = ["---"] * num_text + ["---:"] * (len(columns) - num_text)
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (columns, rules, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def build_pairs(title: str, values: Mapping[str, str]) -> Table:
    """Return a table without a header: a name and its value in each row."""
    table = build_table(title, ("", ""), values.items(), num_text=2)
    table.show_header = False
    table.columns[0].style = "bold"
    table.columns[0].no_wrap = True  # only the value is folded in a narrow terminal
    return table


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, indented, with non-ASCII text as it is."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
