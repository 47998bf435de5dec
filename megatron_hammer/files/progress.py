"""Progress of a command as a live line on stderr. Nothing is printed if stderr is a file or a pipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def build_progress(*columns: ProgressColumn) -> Progress:
    """A live line of these columns, removed at the end; silent if stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def build_byte_progress(*columns: ProgressColumn, has_description: bool = False) -> Progress:
    """A live line for a task counted in bytes: how many, how fast, then `columns`, then the time left."""
    description = (TextColumn("{task.description}"),) if has_description else ()
    rate = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return build_progress(*description, *rate, *columns, TimeRemainingColumn())


@contextmanager
def show_stages(description: str = "{}") -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield show(stage, done, total): one line per stage, added by the first call that names the stage.

    description: text of a stage's line, with {} for its name. total: None while unknown.
    """
    with build_progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(description.format(stage), total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show
