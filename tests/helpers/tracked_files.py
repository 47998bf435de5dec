"""The files of the repository, as git knows them."""

import functools
import subprocess

import pytest

from tests.helpers.imports import ROOT


@functools.cache
def list_tracked_files() -> tuple[str, ...]:
    """Paths of the tracked files that exist, relative to the repository's root."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("the clone's .git folder is missing: clone with git rather than copying the files")
    return tuple(name for name in result.stdout.split("\0") if name and (ROOT / name).exists())
