"""Folders that a run writes into."""

import os
from pathlib import Path

from megatron_hammer.config.flags import flag_of
from megatron_hammer.files.read import is_permitted


def find_unwritable(name: str, path: str) -> list[str]:
    """A problem unless `path` is a folder that can be written or made; nothing is made.

    os.path, since pathlib raises where a folder on the way may not be entered.
    """
    folder = Path(path).absolute()
    # Up to the nearest folder that exists: a run makes those below it, if it may write there.
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and is_permitted(folder, os.W_OK | os.X_OK):
        return []
    why = "is not writable" if folder.is_dir() else "is not a folder"
    return [f"{flag_of(name)}: must be a folder that can be written, got {name}={path} ({folder} {why}). Pass another."]


def is_same_place(first: str | None, second: str | None) -> bool:
    # realpath, so that a link and its target are the same place.
    return first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second)
