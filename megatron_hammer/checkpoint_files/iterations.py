"""The folders that a run leaves in --save, one for each saved iteration, and how one appears and disappears at once.

`iter_0000110` is complete: it was renamed from `unfinished_iter_0000110` after its files, with their hashes, were on
the disk. A folder that is removed is renamed to `removed_iter_...` first. So a kill at any moment leaves either the
whole iteration or a folder whose name says what it is, which the next run clears. The other names do not begin with
`iter_`, because Megatron and other tools list `iter_*`. No torch, no Megatron.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_hammer.checkpoint_files.torch_dist.content_hashes import FileHash, write_hashes
from megatron_hammer.files.publish import bring_to_disk

UNFINISHED_PREFIX, REMOVED_PREFIX = "unfinished_", "removed_"
_ITERATION = re.compile(r"iter_(\d+)")


def read_iteration(name: str) -> int | None:
    """110 of iter_0000110; None of any other name."""
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def list_iterations(save_dir: Path) -> dict[int, Path]:
    """The folders of iterations, in order; also those that are not complete, as another program may have left them."""
    try:
        entries = [(read_iteration(entry.name), entry) for entry in save_dir.iterdir() if entry.is_dir()]
    except OSError:
        return {}
    return dict(sorted((iteration, path) for iteration, path in entries if iteration is not None))


def count_bytes(directory: Path) -> int:
    """Of all files below a folder; 0 without it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def list_leftovers(save_dir: Path) -> list[Path]:
    """Folders of saves and removals that did not come to their end."""
    pattern = re.compile(rf"({UNFINISHED_PREFIX}|{REMOVED_PREFIX})(iter_\d+|release)")
    try:
        return sorted(entry for entry in save_dir.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir())
    except OSError:
        return []


def remove_leftovers(save_dir: Path) -> list[str]:
    """Remove what killed processes left; returns the names. Only for who holds the lock on --save."""
    leftovers = list_leftovers(save_dir)
    for leftover in leftovers:
        _clear(leftover)
    return [leftover.name for leftover in leftovers]


def begin_iteration(directory: Path, *, is_writer: bool) -> Path:
    """The folder to write the iteration into; is_writer: this process clears and makes it, for all.

    The writer also removes the empty folder that Megatron makes under the final name. An older, complete iteration of
    the same name stays until the new one is complete.
    """
    unfinished_dir = directory.with_name(UNFINISHED_PREFIX + directory.name)
    if is_writer:
        _clear(unfinished_dir)
        unfinished_dir.mkdir(parents=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    return unfinished_dir


def publish_iteration(unfinished_dir: Path, directory: Path, known: Mapping[str, FileHash]) -> int:
    """Write the hashes of a complete folder and give it its name; returns its bytes. known: hashes that are known."""
    num_bytes = write_hashes(unfinished_dir, known)
    bring_to_disk(unfinished_dir)
    remove_iteration(directory)
    unfinished_dir.rename(directory)
    bring_to_disk(directory.parent)
    return num_bytes


def _clear(path: Path) -> None:
    """Remove what is in the place of a folder; of a link, only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_iteration(directory: Path) -> None:
    """Remove the folder of an iteration; it loses its name at once, whatever happens while its files are removed.

    A link is only unlinked: what it points to belongs to someone else.
    """
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        removed_dir = directory.with_name(REMOVED_PREFIX + directory.name)
        _clear(removed_dir)
        directory.rename(removed_dir)
        shutil.rmtree(removed_dir, ignore_errors=True)
