"""Result files that exist only when they are complete, several of them all or none.

The sibling of data/atomic_files.py, which this package may not import: scaling/ stands below data/.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron_hammer.errors import PlatformError


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text with the newlines it has; see publish_files."""
    publish_files({path: text})


def write_bytes_atomically(path: Path, content: bytes) -> None:
    publish_files({path: content})


def publish_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write every file as `<path>.partial`, and give them their names only once all of them are on the disk.

    Folders on the way are made; a file that is there is replaced. Raises PlatformError, with no `.partial` left and no
    name given, where one cannot be written.
    """
    partials = {Path(f"{path}.partial"): content for path, content in contents.items()}
    try:
        for partial, content in partials.items():
            _write_whole(partial, content.encode() if isinstance(content, str) else content)
        for path in contents:
            if path.is_dir():
                raise PlatformError(f"{path}: must be a file's name, got a folder. Choose another place.")
        for partial, path in zip(partials, contents, strict=True):
            partial.replace(path)
    except BaseException:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()
        raise


def _write_whole(partial: Path, content: bytes) -> None:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path = str(partial).removesuffix(".partial")
        reason = error.strerror or str(error)
        raise PlatformError(
            f"{path}: file cannot be written ({reason}). Free space, or choose another place."
        ) from error
