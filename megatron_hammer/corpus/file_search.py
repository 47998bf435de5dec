"""Every entry below a folder or behind a pattern, with links followed.

What cannot be reached is reported as a problem and never treated as absent: a folder without permission, a link to
nothing, a name that is too long. `Path.rglob` and `glob.glob` skip such entries without a word, and do not agree on
links to folders.
"""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# A missing mount can leave thousands of links that lead nowhere.
MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a folder: how the search came to it, and what it is, or what a link stands for."""

    path: Path
    status: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


def identify_file(path: Path, status: os.stat_result | None = None) -> object:
    """Return a value that is equal for all names of one file: spellings, links and mounts. Raises OSError."""
    status = os.stat(path) if status is None else status
    # Some network file systems have no inode numbers, and give 0 to every file.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def describe_unreachable(path: Path, error: OSError) -> str:
    """Return the sentence for a path that cannot be read or listed."""
    if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
        return f"{path}: link must lead to a file or a folder, got {os.readlink(path)}. Repair or remove it."
    return f"{path}: input must be readable, got: {error.strerror or error}. Check the path and its permissions."


def shorten(problems: Sequence[str]) -> list[str]:
    """Return at most MAX_PROBLEMS_SHOWN of the problems, and a sentence that counts the others."""
    more = len(problems) - MAX_PROBLEMS_SHOWN
    if more <= 0:
        return list(problems)
    return [*problems[:MAX_PROBLEMS_SHOWN], f"input: {more} more entries have such problems. Solve the first ones."]


@dataclass(slots=True)
class FileSearch:
    """Searches folders and expands patterns, and collects the `problems` of all that it cannot reach.

    is_left_out: says of an entry that it is to be skipped, with everything below it.
    """

    is_left_out: Callable[[Path], bool] = lambda path: False
    problems: list[str] = field(default_factory=list)

    def list_files(self, folder: Path) -> list[Found]:
        """Return all entries below the folder that are not folders, sorted by the parts of their paths."""
        return _sort(found for found in self._walk(folder) if not found.is_folder)

    def expand(self, pattern: str) -> list[Found]:
        """Return what `glob.glob(pattern, recursive=True)` should return, sorted by the parts of the paths."""
        root, *parts = pattern.split("/")
        bases = {f"{root}/": None} if not root else {"": None}
        parts = [part for part in ([root] if root else []) + parts if part]
        for position, part in enumerate(parts):
            is_last = position == len(parts) - 1
            # A dictionary, because `**/**` comes to the same path by several ways.
            bases = {path: None for base in bases for path in self._match(base, part, is_last)}
        matches = []
        for path in map(Path, bases):
            if self.is_left_out(path) or (status := self._read_status(path)) is None:
                continue
            if stat.S_ISDIR(status.st_mode) or not pattern.endswith("/"):
                matches.append(Found(path, status))
        return _sort(matches)

    def _match(self, base: str, part: str, is_last: bool) -> Iterator[str]:
        """Yield the paths that one part of a pattern matches in a folder; `base` ends with a slash or is empty."""
        if part == "**":
            yield from self._match_any_depth(base, is_last)
        elif not glob.has_magic(part):
            try:
                os.lstat(base + part)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    self.problems.append(describe_unreachable(Path(base + part), error))
                return
            yield base + part + ("" if is_last else "/")
        else:
            for entry in self._scan(base or "."):
                if not fnmatch.fnmatch(entry.name, part) or (entry.name[0] == "." and part[0] != "."):
                    continue
                if is_last:
                    yield base + entry.name
                # A link to nothing stands where a folder with matches may have been.
                elif (status := self._read_status(Path(base + entry.name))) and stat.S_ISDIR(status.st_mode):
                    yield f"{base}{entry.name}/"

    def _match_any_depth(self, base: str, is_last: bool) -> Iterator[str]:
        """Yield `base` and all folders below it; for the last part of a pattern all files, which says the same."""
        if not is_last:
            yield base
        for found in self._walk(Path(base or "."), with_hidden=False):
            if found.is_folder != is_last:
                yield f"{found.path}{'' if is_last else '/'}"

    def _walk(self, folder: Path, *, with_hidden: bool = True) -> Iterator[Found]:
        """Yield everything below a folder, without the folder; one that lies in itself by a link is entered once."""
        status = self._read_status(folder)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return
        # A list and not a recursion: folders may be nested deeper than Python's calls. Each comes with the identities
        # of itself and the folders above it: a link to one of these leads to what is being read already.
        pending: list[tuple[Path, frozenset[object]]] = [(folder, frozenset({identify_file(folder, status)}))]
        while pending:
            current, above = pending.pop()
            for entry in self._scan(current):
                path = current / entry.name
                if (entry.name[0] == "." and not with_hidden) or self.is_left_out(path):
                    continue
                if (entry_status := self._read_status(path)) is None:
                    continue
                found = Found(path, entry_status)
                if found.is_folder:
                    identity = identify_file(path, entry_status)
                    if identity in above:
                        continue
                    pending.append((path, above | {identity}))
                yield found

    def _scan(self, folder: str | Path) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except NotADirectoryError:
            return []
        except OSError as error:
            if error.errno != errno.ENOENT or Path(folder).is_symlink():
                self.problems.append(describe_unreachable(Path(folder), error))
            return []

    def _read_status(self, path: Path) -> os.stat_result | None:
        try:
            return os.stat(path)
        except OSError as error:
            self.problems.append(describe_unreachable(path, error))
            return None


def _sort(found: Iterator[Found] | list[Found]) -> list[Found]:
    # By parts, so that the files of a folder stay together. The order of the file system differs between machines.
    return sorted(found, key=lambda entry: entry.path.parts)
