"""What commands do alike with --output-dir."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_hammer.files.publish import publish_results, require_results


def require_folder(folder: Path | None, names: Iterable[str]) -> None:
    """Raise OutputError, before anything is computed, if files of these names could not be written to --output-dir."""
    if folder is not None:
        require_results([folder / name for name in names])


def write_results(folder: Path, contents: Mapping[str, str | bytes | None]) -> None:
    """Publish files by name. None stands for a plot that has nothing to show."""
    publish_results({folder / name: content for name, content in contents.items() if content is not None})


def describe_place(folder: Path | None) -> str:
    """The end of a summary; empty without a folder."""
    return f"; written to {folder}" if folder else ""
