"""Files that exist only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_hammer.errors import DataError


def partial_path(path: str | Path) -> Path:
    return Path(f"{path}.partial")


def cannot_write(path: Path, error: OSError) -> DataError:
    """Say why a file could not be written, as on a full disk."""
    return DataError(f"{path}: file cannot be written ({error.strerror}). Free space, or choose another place.")


@contextmanager
def publish_file(path: Path) -> Iterator[BinaryIO]:
    """Open `<path>.partial` for writing; it gets its name when the block ends, and is removed if the block raises.

    Folders on the way are made. Raises DataError where the file cannot be written.
    """
    partial = partial_path(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
