"""Whole files read, with one sentence for every file that cannot be."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from megatron_hammer.errors import DataError, HammerError

# With them, the answer is for the rights that this process has now.
_KNOWS_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def is_permitted(path: str | Path, mode: int) -> bool:
    """Whether this process may use an existing path so; mode: bits as for os.access."""
    return os.access(path, mode, effective_ids=_KNOWS_EFFECTIVE_IDS)


def cannot_read(path: str | Path, error: OSError, *, raises: type[HammerError] = DataError) -> HammerError:
    """Say why a file could not be read."""
    return raises(f"{path}: file cannot be read ({error.strerror or error}). Check the path and its permissions.")


def read_bytes(path: Path, *, raises: type[HammerError] = DataError) -> bytes:
    """Return what is in a file; raises `raises` if it cannot be read."""
    try:
        refuse_pipe(path, raises)
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error, raises=raises) from error


def read_text(path: Path, *, raises: type[HammerError] = DataError) -> str:
    """Return a UTF-8 text, its line ends as \\n, without a byte order mark, which Windows' editors put before a text.

    Raises `raises` if it cannot be read or is in another encoding.
    """
    try:
        refuse_pipe(path, raises)
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise cannot_read(path, error, raises=raises) from error
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise raises(f"{path}: text must be UTF-8, got {where}. Convert the file with iconv.") from error


def is_present(path: Path, *, raises: type[HammerError] = DataError) -> bool:
    """Whether an optional file is there. Raises `raises` for a name that leads to none, such as a link to nothing.

    `Path.is_file` takes such a file for one that was never written.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if os.path.islink(path):  # False where even that cannot be known
            raise raises(f"{path}: link must lead to a file, got {os.readlink(path)}. Repair or remove it.") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise cannot_read(path, error, raises=raises) from error
    if is_folder:
        raise raises(f"{path}: must be a file, got a folder. Move it away.")
    return True


def refuse_pipes(folder: Path, *, raises: type[HammerError]) -> None:
    """Raise `raises` if a named pipe is in the folder: who opens one waits without end. Not for those further below."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            if not entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):  # a link to nothing
                    refuse_pipe(Path(entry), raises)


def refuse_pipe(path: Path, raises: type[HammerError]) -> None:
    """Raise `raises` if the path is a named pipe."""
    # A named pipe that nobody writes is waited for without end. Those of a shell, `<(command)`, are read once too, but
    # many of these files are read again, by other processes.
    if stat.S_ISFIFO(path.stat().st_mode):
        raise raises(f"{path}: must be a file, got a pipe, which can be read only once. Write it to a file first.")
