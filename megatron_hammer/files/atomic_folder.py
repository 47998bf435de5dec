"""A folder that exists only when it is complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hammer.errors import ConversionError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def publish_directory(save_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield `<save_dir>.partial`, empty; it gets its name when the block ends and is removed if the block raises.

    overwrite: what `save_dir` holds is replaced then. Raises ConversionError if it holds anything otherwise, and if the
    folder cannot be made or the disk is full.
    """
    if not overwrite and save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        found = f"{len(list(save_dir.iterdir()))} entries" if save_dir.is_dir() else "a file"
        raise ConversionError(
            f"{save_dir}: target must be absent or an empty folder, got {found}. Choose another --save."
        )
    partial_dir = save_dir.absolute().with_name(save_dir.absolute().name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        partial_dir.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(
            f"{partial_dir}: directory cannot be made ({error.strerror}). Choose another --save."
        ) from error
    try:
        yield partial_dir
        if overwrite and save_dir.exists():
            shutil.rmtree(save_dir)
        os.replace(partial_dir, save_dir)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ConversionError(
            f"{partial_dir}: directory cannot be written ({error.strerror}). Free space, or choose another --save."
        ) from error
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
