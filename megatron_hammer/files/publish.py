"""Files and folders that get their final name only when they are complete.

Everything is written as `<name>.partial` and renamed at the end, so an incomplete output is never mistaken for a
complete one. An error leaves nothing behind; a kill leaves only `.partial` names. A file is synced to the disk before
it is renamed. Not here: outputs of several parts that a later run continues (data/indexed/pair_writer.py); they take
the `.partial` name and the error from this module.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_hammer.errors import OutputError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # EDQUOT: the quota of the user is used up


def partial_path(path: str | Path) -> Path:
    """Return the name that `path` has until it is complete."""
    return Path(f"{path}.partial")


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Say why a file could not be written, as on a full disk."""
    reason = error.strerror or str(error)
    if error.filename and Path(error.filename) not in (path, partial_path(path), *path.parents):
        reason += f": {error.filename}"  # a file that is read while this one is written
    return OutputError(f"{path}: file cannot be written ({reason}). Free space, or choose another place.")


@contextmanager
def publish_path(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to a writer that opens the file itself; the file gets its name when the block ends.

    Folders on the way are made, and an older file is replaced. If the block raises, the partial file is removed.
    Raises OutputError for an OSError in the block or in the renaming.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _bring_to_disk(partial)
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        # After the renaming there is no file of this name, and nothing is removed.
        _remove(partial)


@contextmanager
def publish_file(path: Path) -> Iterator[BinaryIO]:
    """Open `<path>.partial` for writing; see `publish_path`."""
    with publish_path(path) as partial, open(partial, "wb") as file:
        yield file


def publish_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, or none: they get their names once all of them are on the disk. Text is written as UTF-8.

    Folders on the way are made, and older files are replaced. Raises OutputError if one cannot be written.
    """
    partials = {path: partial_path(path) for path in contents}
    try:
        for path, content in contents.items():
            _write_whole(path, content.encode() if isinstance(content, str) else content)
        # A second loop: an error while writing one file must leave all older files as they were.
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            _remove(partial)


@contextmanager
def publish_directory(save_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield `<save_dir>.partial`, empty; the folder gets its name when the block ends.

    overwrite: what `save_dir` holds is replaced at that moment. If the block raises, the partial folder is removed.
    Raises OutputError if `save_dir` holds anything and `overwrite` is not set, if the folder cannot be made, or if the
    disk is full. Other OSErrors pass: the block also reads, and a failure to read is not one to write.
    """
    if not overwrite and save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        found = f"{len(list(save_dir.iterdir()))} entries" if save_dir.is_dir() else "a file"
        raise OutputError(f"{save_dir}: target must be absent or an empty folder, got {found}. Choose another --save.")
    partial_dir = partial_path(save_dir.absolute())
    # left by a run that was killed
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        partial_dir.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"{partial_dir}: directory cannot be made ({error.strerror}). Choose another --save."
        ) from error
    try:
        yield partial_dir
        # A folder can be renamed over an empty folder only.
        if overwrite and save_dir.exists():
            shutil.rmtree(save_dir)
        partial_dir.replace(save_dir)
    except OSError as error:
        # The block may also read, for example a damaged input. "Free space" would be the wrong remedy for that.
        if error.errno not in _FULL_DISK:
            raise
        raise OutputError(
            f"{partial_dir}: directory cannot be written ({error.strerror}). Free space, or choose another --save."
        ) from error
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def _write_whole(path: Path, content: bytes) -> None:
    """Write the partial file of `path`, and check that it can take its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path(path).write_bytes(content)
        _bring_to_disk(partial_path(path))
        if path.is_dir():  # found before the first file is renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise cannot_write(path, error) from error


def _bring_to_disk(path: Path) -> None:
    # Without this, a power cut could leave a file that has its name and is empty.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
