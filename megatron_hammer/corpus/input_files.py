"""Which files the inputs of a run stand for: files, glob patterns and directories; plain, compressed, or Parquet.

A file is known by what it is, not by how it is spelled: `a.jsonl`, `sub/../a.jsonl` and a link are one file. What a run
itself writes beside its inputs is none of them.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.corpus.file_search import FileSearch, Found, describe_unreachable, identify_file, shorten
from megatron_hammer.errors import DataError
from megatron_hammer.files.publish import partial_pattern
from megatron_hammer.files.read import is_permitted

TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
SUPPORTED_SUFFIXES = (*(t + c for t in TEXT_SUFFIXES for c in COMPRESSION_SUFFIXES), ".parquet")
# What the preprocessor writes beside a .bin/.idx pair is JSON too, and no corpus.
MANIFEST_SUFFIX = ".manifest.json"
JOURNAL_SUFFIX = ".journal.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFiles:
    """The files that inputs stand for, in reading order, and those in directories that no reader handles."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def find_input_files(
    inputs: Sequence[str | Path], is_own_output: Callable[[Path], bool] = lambda path: False
) -> InputFiles:
    """Resolve files, glob patterns and directories (searched recursively, in sorted order, with links followed).

    is_own_output: says of a path that the run itself writes it; such files are neither inputs nor ignored files.
    Raises DataError listing every input that is missing, matches nothing, or has a type that cannot be read, every
    entry that cannot be reached or read, and every file that comes twice: its documents would be there twice.
    """
    files: dict[object, tuple[Path, int]] = {}
    ignored: dict[Path, None] = {}
    problems: list[str] = []
    for position, item in enumerate(inputs):
        resolved = _Resolver(str(item), is_own_output, problems)
        for found in resolved.find():
            known, earlier = files.setdefault(identify_file(found.path, found.status), (found.path, position))
            # One pattern may match a folder and, besides, files below it.
            if earlier != position or known != found.path:
                names = f"from {inputs[earlier]} and {item}" if found.path == known else f"as {known} and {found.path}"
                problems.append(f"{found.path}: file must be named once, got it {names}. Drop one of them.")
        ignored |= dict.fromkeys(resolved.ignored)
    if not files and not problems:
        problems.append(f"{inputs[0]}: inputs must be other files than this run's own outputs. Name the corpus.")
    if problems:
        raise DataError(*shorten(problems))
    return InputFiles(files=tuple(path for path, _ in files.values()), ignored=tuple(ignored))


def bare_name(path: Path) -> str:
    """Return the file's name in lower case without the suffix of its compression."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def show_path(path: Path) -> str:
    """Return the path as text that can be stored and printed; bytes that are not UTF-8 appear as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSION_SUFFIXES[1:])


def match_outputs(folder: Path, names: str) -> Callable[[Path], bool]:
    """Return the test for files of the folder, however it is spelled, whose names match a regular expression."""
    pattern = re.compile(names)
    real_folder = os.path.realpath(folder)
    # The name first: it decides for nearly every file, without a look at the disk.
    return lambda path: bool(pattern.fullmatch(path.name)) and os.path.realpath(path.parent) == real_folder


def match_partials(*outputs: Path | None) -> Callable[[Path], bool]:
    """Return the test for what a killed run that writes these files leaves behind; the files themselves are no part."""
    tests = [match_outputs(path.parent, partial_pattern(path)) for path in outputs if path is not None]
    return lambda path: any(test(path) for test in tests)


class _Resolver:
    """One input: its files, and what is `ignored` in folders; what is wrong goes to `problems`."""

    def __init__(self, item: str, is_own_output: Callable[[Path], bool], problems: list[str]):
        self._item = item
        self._is_own_output = is_own_output
        self._problems = problems
        self._search = FileSearch(is_own_output, problems)
        self.ignored: list[Path] = []

    def find(self) -> Iterator[Found]:
        path = Path(self._item)
        try:
            given = Found(path, os.stat(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            if path.is_symlink():
                self._problems.append(describe_unreachable(path, error))
            # Patterns come last: a file may have brackets in its name.
            elif glob.has_magic(self._item):
                yield from self._expand()
            else:
                self._problems.append(f"{path}: input file does not exist. Check the path.")
            return
        except OSError as error:
            self._problems.append(describe_unreachable(path, error))
            return
        if given.is_folder:
            yield from self._search_folder(path)
        elif not self._is_own_output(path):
            yield from self._check(given)

    def _expand(self) -> Iterator[Found]:
        num_problems = len(self._problems)
        matches = self._search.expand(self._item)
        # Where a folder could not be read, it is not known whether something in it matches.
        if not matches and len(self._problems) == num_problems:
            self._problems.append(
                f"{self._item}: pattern must match a file, got none. Check the folder and the suffix."
            )
        for match in matches:
            yield from self._search_folder(match.path) if match.is_folder else self._check(match)

    def _search_folder(self, folder: Path) -> Iterator[Found]:
        num_problems = len(self._problems)
        found = self._search.list_files(folder)
        paths = {entry.path for entry in found}
        partials = [path for path in paths if path.name.endswith(".bin.partial")]
        inputs = []
        for entry in found:
            if _is_supported(entry.path) and not _describes_a_pair(entry.path, paths, partials):
                inputs.append(entry)
            else:
                self.ignored.append(entry.path)
        if not inputs and len(self._problems) == num_problems:
            self._problems.append(
                f"{folder}: directory must hold a file of type {' '.join(SUPPORTED_SUFFIXES)}, "
                f"got none among {len(found)} files. Check the path."
            )
        for entry in inputs:
            yield from self._check(entry)

    def _check(self, found: Found) -> Iterator[Found]:
        """Yield the file if it can be read as a corpus."""
        path = found.path
        if not _is_supported(path):
            self._problems.append(
                f"{path}: file type must be one of {' '.join(SUPPORTED_SUFFIXES)}, got {path.suffix or 'none'}. "
                "Convert or rename it."
            )
        elif not stat.S_ISREG(found.status.st_mode):
            # its size and hash belong in the manifest, and a pipe can be read only once
            self._problems.append(
                f"{path}: input must be a regular file, got a pipe or a device. Write it to a file first."
            )
        # Now, and not after hours of reading the files before it.
        elif not is_permitted(path, os.R_OK):
            self._problems.append(describe_unreachable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
        elif show_path(path) != str(path):
            self._problems.append(f"{show_path(path)}: name must be UTF-8, because manifests record it. Rename it.")
        else:
            yield found


def _is_supported(path: Path) -> bool:
    return path.name.lower().endswith(SUPPORTED_SUFFIXES)


def _describes_a_pair(path: Path, beside: set[Path], partials: Sequence[Path]) -> bool:
    """Say whether a JSON file is the manifest of a pair, or the journal of an unfinished one, in the same search.

    partials: those of the paths beside it that are the .bin of an unfinished pair.
    """
    if path.name.endswith(MANIFEST_SUFFIX):
        prefix = str(path).removesuffix(MANIFEST_SUFFIX)
        return any(Path(prefix + suffix) in beside for suffix in (".idx", ".bin"))
    if path.name.endswith(JOURNAL_SUFFIX):
        start = f"{path.name.removesuffix(JOURNAL_SUFFIX)}_"
        return any(other.parent == path.parent and other.name.startswith(start) for other in partials)
    return False
