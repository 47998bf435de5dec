"""Commands of scaling_study in this process."""

from contextlib import redirect_stdout
from pathlib import Path

from megatron_hammer.cli.scaling_study.main import parse_arguments


def run_study(*flags: str) -> None:
    arguments = parse_arguments(flags)
    arguments.run(arguments)


def write_projection(path: Path, *flags: str) -> Path:
    """The projection.json of `project` with these flags. Without --output-dir, which also draws the plots."""
    with path.open("w", encoding="utf-8") as file, redirect_stdout(file):
        run_study("project", *flags, "--json")
    return path
