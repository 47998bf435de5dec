"""Files and folders that get their final name only when they are complete.

Everything is written under a name that nobody else has, `<name>.<random>.partial`, and renamed at the end, so an
incomplete output is never mistaken for a complete one. An error leaves nothing behind. After a kill, the next run that
writes the same output removes what was left: only names of this form whose writer is gone, which a lock tells. A file
is synced to the disk before it is renamed. Not here: outputs of several parts that a later run continues
(data/indexed/pair_writer.py), which are found by their name, `partial_path`, and take the error from this module.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_hammer.errors import OutputError
from megatron_hammer.files.read import is_permitted

# EDQUOT: the quota of the user is used up. EFBIG: the largest file of this disk, or of `ulimit -f`.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RANDOM_BYTES = 8
_RANDOM_PART = rf"\.[0-9a-f]{{{2 * _RANDOM_BYTES}}}"
OWN_MARK = "megatron_hammer"  # in every JSON, page and script that a command writes
PNG_MAGIC = b"\x89PNG\r\n"
_LOCK_PATIENCE_S = 5.0  # for the lock of a folder, which is held for moments only


def partial_path(path: str | Path) -> Path:
    """Return the name that an output of several parts has until it is complete."""
    return Path(f"{path}.partial")


def longest_partial_name(name: str) -> str:
    """A name as long as the one under which a file of this name is written."""
    return f"{name}.{'0' * 2 * _RANDOM_BYTES}.partial"


def partial_pattern(path: Path) -> str:
    """Return a regular expression for the names that a killed run can have left in the place of this output."""
    return rf"{re.escape(path.name)}({_RANDOM_PART})?\.partial"


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Say why a file could not be written, as on a full disk."""
    reason = error.strerror or str(error)
    is_own = error.filename and re.fullmatch(partial_pattern(path), Path(os.fsdecode(error.filename)).name)
    if error.filename and not is_own and Path(os.fsdecode(error.filename)) not in (path, *path.parents):
        reason += f": {error.filename}"  # a file that is read while this one is written
    return OutputError(f"{path}: file cannot be written ({reason}). Free space, or choose another place.")


@contextmanager
def publish_path(path: Path) -> Iterator[Path]:
    """Yield the partial name, a new empty file, to a writer that opens it itself; it gets its name when the block ends.

    Folders on the way are made, and an older file is replaced. If the block raises, the partial file is removed.
    Raises OutputError for an OSError in the block or in the renaming, and if nothing was written.
    """
    with _publish(path) as partial:
        yield partial
        if not partial.stat().st_size:
            raise FileNotFoundError(errno.ENODATA, "nothing was written", str(partial))


@contextmanager
def publish_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file of the partial name for writing; see `publish_path`."""
    with _publish(path) as partial, open(partial, "wb") as file:
        yield file


@contextmanager
def _publish(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _claim(path, is_folder=False) as partial:
            yield partial
            bring_to_disk(partial)
            partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def publish_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, or none: they get their names once all of them are on the disk. Text is written as UTF-8.

    Folders on the way are made, and older files are replaced. Raises OutputError if one cannot be written.
    """
    with ExitStack() as stack:
        partials = {
            path: _write_whole(path, content.encode() if isinstance(content, str) else content, stack)
            for path, content in contents.items()
        }
        # Afterwards, because an error while writing one file must leave all older files as they were.
        for path, partial in partials.items():
            partial.replace(path)


def publish_results(contents: Mapping[Path, str | bytes], *, mark: str = OWN_MARK) -> None:
    """`publish_files` of a command's results, which may replace those of an earlier run and nothing else.

    mark: text that every result of this kind has in it. Raises OutputError, and writes nothing, as `require_results`.
    """
    require_results(contents, mark=mark)
    publish_files(contents)


def require_results(paths: Iterable[Path], *, mark: str = OWN_MARK) -> None:
    """Raise OutputError if files are in these places of which none has the mark: something else wrote them.

    Also if a file is in the place of a folder on the way, or the folder cannot be written: a command that computes for
    minutes calls this first.
    """
    paths = list(paths)
    for path in paths:
        _require_folder(path)
    present = [path for path in paths if _is_filled(path)]
    if present and not any(mark.encode() in path.read_bytes() for path in present):
        raise _not_replaced(present[0])


def require_places(*outputs: tuple[Path | None, Callable[[Path], bool]]) -> None:
    """Raise OutputError if a file that is no earlier result is in the place of an output, or another output is.

    outputs: each path, None for one that is not asked for, with the test of a file for being such a result.
    """
    places: dict[str, Path] = {}
    for path, is_result in outputs:
        if path is None:
            continue
        if (other := places.setdefault(os.path.realpath(path), path)) is not path:
            raise OutputError(f"{path}: two outputs must have two names, got {other} for both. Choose another name.")
        if _is_filled(path) and not is_result(path):
            raise _not_replaced(path)


def begins_with(mark: bytes) -> Callable[[Path], bool]:
    """The test, for `require_places`, of files that begin with these bytes."""

    def test(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(mark)) == mark

    return test


def _require_folder(path: Path) -> None:
    """Raise OutputError unless the file's folder can be written, or made in the nearest one that exists."""
    folder = path.absolute().parent
    # os.path, since pathlib raises where a folder on the way may not be entered.
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        raise cannot_write(path, OSError(errno.ENOTDIR, f"{folder} is not a folder"))
    if not is_permitted(folder, os.W_OK | os.X_OK):
        raise cannot_write(path, OSError(errno.EACCES, f"{folder} is not writable"))
    if os.path.isdir(path):
        raise cannot_write(path, OSError(errno.EISDIR, "a folder has this name"))


def require_result_folder(folder: Path, name: str, *, mark: str = "", holds_only: str = ".*") -> None:
    """Raise OutputError if a folder holds anything and is no earlier result, which has a file `name` with the mark.

    holds_only: a regular expression for the names of a result's files; a file of another name is a user's own.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / name).is_file() or mark.encode() not in (folder / name).read_bytes():
        lack = f"no {name} of this tool" if folder.is_dir() else "a file"
        raise OutputError(
            f"{folder}: --overwrite replaces an earlier result only, got {lack}. Choose another --save, or remove it."
        )
    if others := sorted(path.name for path in folder.iterdir() if not re.fullmatch(holds_only, path.name)):
        raise OutputError(
            f"{folder}: --overwrite replaces an earlier result only, got {', '.join(others[:5])} in it too. "
            "Choose another --save, or move this away."
        )


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _not_replaced(path: Path) -> OutputError:
    return OutputError(
        f"{path}: file must be an earlier result of this command to be replaced, got another file. "
        "Choose another place, or move it away."
    )


@contextmanager
def publish_directory(save_dir: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a new empty folder beside `save_dir`, which gets its name when the block ends.

    overwrite: what `save_dir` holds is replaced at that moment. If the block raises, the partial folder is removed.
    sources: the files and folders that the result is made of.
    Raises OutputError if `save_dir` holds anything and `overwrite` is not set, if it is or holds a source, if another
    process is writing it, if the folder cannot be made, or if the disk is full. Other OSErrors pass: the block also
    reads, and a failure to read is not one to write.
    """
    require_apart(save_dir, sources)
    if not overwrite:
        require_free(save_dir)
    target = save_dir.absolute()
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial_dir = stack.enter_context(_claim(target, is_folder=True))
        except OSError as error:
            raise OutputError(
                f"{partial_path(target)}: directory cannot be made ({error.strerror}). Choose another --save."
            ) from error
        try:
            yield partial_dir
            _share_files(partial_dir)
            if overwrite:
                _replace_folder(partial_dir, save_dir)
            else:
                require_free(save_dir)  # again: where locks do not work, another process may have been quicker
                partial_dir.replace(save_dir)
        except OSError as error:
            # The block may also read, for example a damaged input. "Free space" would be the wrong remedy for that.
            if error.errno not in _FULL_DISK:
                raise
            raise OutputError(
                f"{partial_dir}: directory cannot be written ({error.strerror}). Free space, or choose another --save."
            ) from error


def require_apart(target: Path, sources: Sequence[Path]) -> None:
    """Raise OutputError if replacing the file or folder `target` would remove a source."""
    for source in sources:
        # resolve: the same place may be named through a link or a relative path.
        if source.resolve().is_relative_to(target.resolve()):
            raise OutputError(f"{target}: target must not be or hold the input {source}. Choose another --save.")


def require_free(save_dir: Path) -> None:
    """Raise OutputError if something is in the place of a folder that is to be written."""
    if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        found = f"{len(list(save_dir.iterdir()))} entries" if save_dir.is_dir() else "a file"
        raise OutputError(f"{save_dir}: target must be absent or an empty folder, got {found}. Choose another --save.")


def _share_files(folder: Path) -> None:
    """Let others read each file as the folder, which the umask decides: safetensors writes files for the owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        found = path.lstat()
        # A file with a second name is not only this folder's.
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & mode != mode:
            path.chmod(stat.S_IMODE(found.st_mode) | mode)


def _replace_folder(partial_dir: Path, save_dir: Path) -> None:
    """Put the new folder in the place of the old one, which is whole under another name until the new one is there."""
    old_dir = partial_dir.with_suffix(".replaced")
    if save_dir.exists():
        save_dir.rename(old_dir)
    partial_dir.replace(save_dir)
    shutil.rmtree(old_dir, ignore_errors=True)


@contextmanager
def _claim(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A new file or folder of a partial name of `path`, locked while the block runs and removed at its end.

    What killed runs left of the same output is removed. Raises OutputError if another process is writing the folder.
    """
    with _lock_folder(path.parent):  # two processes that begin at the same moment look one after the other
        if (other := _clear_leftovers(path)) is not None and is_folder:
            raise OutputError(
                f"{path}: must not be written by two processes at a time, got another one that writes {other.name}. "
                "Wait for it, or choose another --save."
            )
        partial = Path(f"{path}.{secrets.token_hex(_RANDOM_BYTES)}.partial")
        if is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        descriptor = os.open(partial, os.O_RDONLY)
        _try_lock(descriptor)
    try:
        yield partial
    finally:
        # After the renaming there is nothing of this name, and nothing is removed.
        _remove(partial)
        os.close(descriptor)


def _clear_leftovers(path: Path) -> Path | None:
    """Remove what killed runs left of this output; returns the partial name of a process that is writing it."""
    writing = None
    # A name without the random part is of an older version, or a user's own: it stays.
    names = re.compile(rf"{re.escape(path.name)}{_RANDOM_PART}\.partial")
    for found in [entry for entry in path.parent.iterdir() if names.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(found, os.O_RDONLY)
            try:
                is_locked = _try_lock(descriptor)
                if is_locked:
                    _remove(found)
                elif is_locked is False:
                    writing = found
            finally:
                os.close(descriptor)
    return writing


def _try_lock(descriptor: int) -> bool | None:
    """Lock until the descriptor is closed. False: another process has the lock; None: the disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        give_up_at_s = time.monotonic() + _LOCK_PATIENCE_S
        # A user may hold the lock of this folder for a whole job (`flock folder command`), so it is not waited for.
        while _try_lock(descriptor) is False and time.monotonic() < give_up_at_s:
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _write_whole(path: Path, content: bytes, stack: ExitStack) -> Path:
    """Write a file under its partial name, which it keeps until `stack` ends; checks that it can take its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = stack.enter_context(_claim(path, is_folder=False))
        partial.write_bytes(content)
        bring_to_disk(partial)
        if path.is_dir():  # found before the first file is renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise cannot_write(path, error) from error
    return partial


def bring_to_disk(path: Path) -> None:
    """Without this, a power cut could leave a file that has its name and is empty, or undo a renaming in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
