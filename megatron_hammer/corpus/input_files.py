"""Which files an input stands for: a file, a glob pattern or a directory; plain, compressed, or Parquet."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
SUPPORTED_SUFFIXES = (*(t + c for t in TEXT_SUFFIXES for c in COMPRESSION_SUFFIXES), ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFiles:
    """The files that inputs stand for, in reading order, and those in directories that no reader handles."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def find_input_files(inputs: Sequence[str | Path]) -> InputFiles:
    """Resolve files, glob patterns and directories (searched recursively, in sorted order) to files.

    Raises DataError listing every input that is missing, matches nothing, has a type that cannot be read, or names a
    file that another input names too: its documents would be there twice.
    """
    files: dict[Path, str] = {}
    ignored: list[Path] = []
    problems: list[str] = []
    for item in map(str, inputs):
        try:
            found = _resolve_input(item)
        except DataError as error:
            problems.extend(error.problems)
            continue
        ignored.extend(found.ignored)
        for path in found.files:
            if path in files:
                problems.append(
                    f"{path}: file must be named once, got it from {files[path]} and {item}. Drop one of them."
                )
            files[path] = item
    if problems:
        raise DataError(*problems)
    return InputFiles(files=tuple(files), ignored=tuple(ignored))


def bare_name(path: Path) -> str:
    """Return the file's name in lower case without the suffix of its compression."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSION_SUFFIXES[1:])


def _resolve_input(text: str) -> InputFiles:
    path = Path(text)
    if path.is_dir():
        return _search_directory(path)
    # Before patterns: a file may have brackets in its name.
    if path.exists():
        if not _is_supported(path):
            raise DataError(
                f"{path}: file type must be one of {' '.join(SUPPORTED_SUFFIXES)}, got {path.suffix or 'none'}. "
                "Convert or rename it."
            )
        if not path.is_file():  # its size and hash belong in the manifest, and a pipe can be read only once
            raise DataError(f"{path}: input must be a regular file, got a pipe or a device. Write it to a file first.")
        return InputFiles(files=(path,), ignored=())
    if glob.has_magic(text):
        # glob returns files in the order of the file system, which differs from machine to machine.
        matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
        if not matches:
            raise DataError(f"{text}: pattern must match a file, got none. Check the folder and the suffix.")
        return find_input_files(matches)
    raise DataError(f"{text}: input file does not exist. Check the path.")


def _search_directory(directory: Path) -> InputFiles:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    files = tuple(path for path in found if _is_supported(path))
    if not files:
        raise DataError(
            f"{directory}: directory must hold a file of type {' '.join(SUPPORTED_SUFFIXES)}, "
            f"got none among {len(found)} files. Check the path."
        )
    return InputFiles(files=files, ignored=tuple(path for path in found if not _is_supported(path)))


def _is_supported(path: Path) -> bool:
    return path.name.lower().endswith(SUPPORTED_SUFFIXES)
